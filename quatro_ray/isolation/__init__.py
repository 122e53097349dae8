"""Processes that can be killed, for code of users and text of models: both sides of their pipes, and pools of them."""
