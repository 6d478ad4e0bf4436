"""Numbers: block kernels, the operator, the SVD. Nothing here knows of cells."""
