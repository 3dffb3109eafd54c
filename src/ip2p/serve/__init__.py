"""The editor for many at once: a page in the browser and an HTTP server (the extra `[serve]`)."""
