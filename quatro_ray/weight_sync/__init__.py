"""ZeRO-3 as a vLLM WeightSource; the CPU back end; one object that drives a whole update."""
