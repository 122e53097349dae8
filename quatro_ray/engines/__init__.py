"""vLLM generation, DeepSpeed learning and their checkpoints, as plain classes without Ray."""
