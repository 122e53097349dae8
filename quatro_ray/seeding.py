"""Seeds derived from their purpose alone, so that neither timing nor placement changes what is drawn."""

from __future__ import annotations

import hashlib


def seed_of(seed: int, *what: str | int) -> int:
    """Return a seed of 31 bits, derived from another seed and a name for what is to be drawn."""
    digest = hashlib.sha256("/".join(map(str, (seed, *what))).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
