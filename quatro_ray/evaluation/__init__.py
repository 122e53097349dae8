"""pass@k and its relatives on held-out questions."""
