"""quatro_ray: asynchronous RL for language models with an exact trust region per query."""

__version__ = "0.1.0"
