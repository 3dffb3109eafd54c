"""Pictures and their metadata, masks, settings text, full-resolution output."""
