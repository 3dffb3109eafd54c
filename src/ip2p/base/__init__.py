"""The foundation: errors, files, devices, the terminal, crash-safe jobs."""
