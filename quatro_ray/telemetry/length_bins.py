"""The bins in which lengths are counted, the same for all data, so that counts of several steps can be added."""

from __future__ import annotations

_NUM_EXACT = 16
_BITS = 4


def length_bin(num_tokens: int) -> int:
    """Return the smallest length of the bin that holds `num_tokens`.

    Lengths below 16 have a bin each. Above, there are eight bins from each power of two to the next.
    """
    shift = max(0, num_tokens.bit_length() - _BITS)
    return num_tokens >> shift << shift


def bin_width(smallest: int) -> int:
    """Return how many lengths the bin with this smallest length holds."""
    return 1 if smallest < _NUM_EXACT else 1 << (smallest.bit_length() - _BITS)
