"""vLLM generation and DeepSpeed learning as plain classes, without Ray."""
