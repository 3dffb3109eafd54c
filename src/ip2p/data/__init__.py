"""Edit pairs in: records, readers of every layout they are published in, checks, and conversion."""
