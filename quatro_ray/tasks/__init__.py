"""Where queries and rewards come from."""
