"""Pictures: files, metadata, masks, infotext, full-resolution output."""
