"""The methods: scIALM, what surrounds it, and recovery from pooled measurements."""
