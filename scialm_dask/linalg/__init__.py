"""Block kernels, the operator W, and its SVD. Knows nothing of cells."""
