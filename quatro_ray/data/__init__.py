"""Data: reads queries from files, Hugging Face datasets and generators, then mixes, shuffles and filters them."""
