"""Evaluation on held-out questions: pass@k, maj@k and related metrics, and the engines that answer."""
