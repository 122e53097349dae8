"""Benchmarks of single parts on one GPU. They need torch and DeepSpeed, and neither Ray nor vLLM."""
