"""Rewards: functions that score a response, the processes and servers that run them, and their weighted sum."""
