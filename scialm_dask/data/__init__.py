"""Matrices on disk and in blocks. Nothing here knows the method."""
