"""A language model small enough that a whole RL run takes seconds on one core."""
