"""Real faults for benchmarks/chaos.py: injection, detection, recovery, and the audit of the records afterwards."""
