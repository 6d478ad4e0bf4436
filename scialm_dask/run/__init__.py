"""Plan a run, find workers for it, and run it with checkpoints."""
