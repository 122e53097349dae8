"""Rollouts of several turns: a user's function in a process of its own, talking to the policy."""
