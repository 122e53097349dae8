"""The jobs that the command line runs: training, and the evaluation of a model."""
