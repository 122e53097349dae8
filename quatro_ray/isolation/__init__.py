"""Isolation of user code and model text: worker processes that can be killed, and the bubblewrap sandbox."""
