"""Expression from pooled measurements."""
