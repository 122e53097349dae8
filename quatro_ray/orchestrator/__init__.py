"""The controller of a run and its components: groups, recovery, checkpoints, evaluation, placement."""
