"""The controller of a run, and what it is made of: groups, recovery, checkpoints, placement."""
