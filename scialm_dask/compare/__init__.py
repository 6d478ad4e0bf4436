"""Methods side by side: the benchmark behind `scialm-dask evaluate`."""
