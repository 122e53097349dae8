"""The two small interfaces of a task, and the stream of queries made from one."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Protocol

from quatro_ray.types import Query, Score


class Dataset(Protocol):
    """Questions to train on and distinct ones to evaluate with."""

    train: list[Query]
    held_out: list[Query]


class Verifier(Protocol):
    """Judges one response. A pure function of its arguments; it may raise, but never guesses."""

    def __call__(self, query: Query, text: str) -> Score: ...


def shuffled_epochs(queries: Sequence[Query], seed: int) -> Iterator[Query]:
    """Every query once an epoch, each epoch in its own order, for ever; a function of the seed alone."""
    epoch = 0
    while True:
        order = list(range(len(queries)))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        for index in order:
            yield queries[index]
        epoch += 1
