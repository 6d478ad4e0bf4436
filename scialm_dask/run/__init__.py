"""Planning a run and finding workers for it."""
