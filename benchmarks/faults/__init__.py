"""Real faults for benchmarks/chaos.py: what is broken, how it is seen to recover, and what must hold afterwards."""
