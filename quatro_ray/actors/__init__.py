"""Ray wrappers: they translate calls, nothing else."""
