"""Seeds that depend on what they are for, and on nothing else: neither timing nor the place where it runs."""

from __future__ import annotations

import hashlib


def seed_of(seed: int, *what: str | int) -> int:
    """31 bits, from another seed and what is to be drawn."""
    digest = hashlib.sha256("/".join(map(str, (seed, *what))).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
