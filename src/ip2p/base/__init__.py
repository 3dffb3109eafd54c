"""What everything stands on: errors, files, devices, the terminal, committed work."""
