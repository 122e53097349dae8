"""Environments: rollouts of several turns, in which a user's function in its own process talks to the policy."""
