"""The command line; importing it imports no torch."""
