"""Masking, scores and comparisons."""
