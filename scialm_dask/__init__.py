"""Low-rank completion of single-cell expression matrices, out of core and distributed."""

__version__ = "0.1.0.dev0"
