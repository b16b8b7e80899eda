"""The command line, metrics and timelines."""
