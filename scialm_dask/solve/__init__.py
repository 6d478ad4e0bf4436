"""The methods, scIALM and denoising by count splitting, with scaling, new cells and results on disk."""
