"""Experiment trackers and callbacks of users, each in a process of its own."""
