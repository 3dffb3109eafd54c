"""The command line, with one module per noun."""
