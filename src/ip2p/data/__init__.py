"""Edit pairs: records, readers for all published layouts, checks and conversion."""
