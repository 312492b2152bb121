"""Exports: an encoder written for another library, read back there, compared, and only then put in place."""
