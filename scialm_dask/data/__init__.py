"""Matrices on disk and in blocks. Nothing here knows of the method."""
