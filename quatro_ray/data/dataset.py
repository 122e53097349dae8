"""The queries of a run, what was left out of them, and the endless stream of queries for training."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from quatro_ray.types import Query

if TYPE_CHECKING:
    from quatro_ray.data.held_out import Question


@dataclass
class Rows:
    """The queries of one source.

    Attributes:
        places: file and line of each query, by its id.
        skipped: number of rows that were left out, by reason.
        questions: what each query asks, by its id, if that is not its prompt.
    """

    queries: list[Query] = field(default_factory=list)
    places: dict[str, str] = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    questions: dict[str, Question] = field(default_factory=dict)


@dataclass(frozen=True)
class Dataset:
    """All queries of a run.

    Attributes:
        train: queries for training, by source.
        weights: relative frequency with which each training source is drawn.
        held_out: queries for evaluation, by source.
        skipped: number of rows that were left out, by reason, for each section of the data.
        warmup: queries that a tiny model imitates before training, and queries held out from those.
    """

    train: Mapping[str, Sequence[Query]]
    weights: Mapping[str, float]
    held_out: Mapping[str, Sequence[Query]]
    skipped: Mapping[str, Counter[str]]
    warmup: tuple[Sequence[Query], Sequence[Query]] = ((), ())


class QueryStream(Iterator[Query]):
    """An endless stream: draws a source by its weight, and from the source every query once per epoch, reshuffled.

    Every draw depends only on the seed and the number of draws so far, so `state()` is small and resuming is exact.
    """

    def __init__(self, dataset: Dataset, seed: int, *, shuffle: bool = True) -> None:
        self._sources = {name: list(queries) for name, queries in dataset.train.items()}
        self._weights = [dataset.weights[name] for name in self._sources]
        self._seed = seed
        self._shuffle = shuffle
        self._drawn = dict.fromkeys(self._sources, 0)
        self._orders: dict[str, tuple[int, list[int]]] = {}

    def __next__(self) -> Query:
        number = sum(self._drawn.values())
        # each draw has its own random generator, so the number of draws is the only state
        (name,) = random.Random(f"{self._seed}/source/{number}").choices(list(self._sources), self._weights)
        epoch, position = divmod(self._drawn[name], len(self._sources[name]))
        self._drawn[name] += 1
        return self._sources[name][self._order(name, epoch)[position]]

    def _order(self, name: str, epoch: int) -> list[int]:
        if self._orders.get(name, (-1, []))[0] != epoch:
            order = list(range(len(self._sources[name])))
            if self._shuffle:
                random.Random(f"{self._seed}/{name}/{epoch}").shuffle(order)
            self._orders[name] = epoch, order
        return self._orders[name][1]

    def state(self) -> dict[str, int]:
        """Return the number of draws so far, by source."""
        return dict(self._drawn)

    def restore(self, state: Mapping[str, int]) -> None:
        """Continue from a saved state.

        Raises:
            ValueError: `state` has other sources.
        """
        if state.keys() != self._drawn.keys():
            raise ValueError(f"the data has sources {sorted(self._drawn)}, the saved position {sorted(state)}")
        self._drawn = dict(state)
