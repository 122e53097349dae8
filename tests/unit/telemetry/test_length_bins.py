"""Bins of lengths follow each other without a gap."""

from __future__ import annotations

import pytest

from quatro_ray.telemetry.length_bins import bin_width, length_bin


@pytest.mark.parametrize(
    ("length", "smallest"), [(0, 0), (1, 1), (15, 15), (16, 16), (17, 16), (31, 30), (32, 32), (35, 32), (8191, 7680)]
)
def test_bins_of_lengths(length: int, smallest: int) -> None:
    assert length_bin(length) == smallest
    assert length_bin(smallest) == smallest


def test_a_bin_ends_where_the_next_one_begins() -> None:
    smallest = 0
    while smallest < 100_000:
        following = smallest + bin_width(smallest)
        assert length_bin(following - 1) == smallest
        assert length_bin(following) == following
        smallest = following
