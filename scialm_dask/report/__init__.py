"""The HTML report, its figures and diagnostics."""
