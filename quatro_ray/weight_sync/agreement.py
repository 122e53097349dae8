"""Measures whether engines and learner hold the same policy: both score the same tokens, and compare their weights.

Shape letters: T tokens of a sequence.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

_logger = logging.getLogger(__name__)
_LENGTHS = (24, 9, 17)
"""Tokens of each sequence, where the engine's limit allows them."""


@dataclass(frozen=True)
class Scored:
    """A sequence with the log-probs of its tokens.

    Attributes:
        token_ids: [T].
        logprobs: float32 [T−1], nats at temperature 1, of each token but the first given those before it.
    """

    token_ids: list[int]
    logprobs: NDArray[np.float32]


class Scorer(Protocol):
    """The learner's part (actors/learner_group.py:LearnerGroup)."""

    async def score_fixed(self, max_tokens: int) -> list[Scored]:
        """Return the fixed sequences, of at most `max_tokens` tokens each, with the learner's log-probs."""
        ...

    async def parameter_checksums(self, dtypes: dict[str, str]) -> dict[str, str]:
        """Return dtype, shape and checksum of the weights, cast to these dtypes, by name."""
        ...


@dataclass(frozen=True)
class AgreementCheck:
    """When and how strictly engines are held against the learner.

    Attributes:
        learner: scores under its present weights.
        max_tokens: longest sequence that an engine takes.
        max_nats: largest mean absolute difference of a log-prob that rounding explains.
        every_updates: number of updates from one check to the next; the first update is always checked.
        deadline_s: time that a check may take, seconds.
    """

    learner: Scorer
    max_tokens: int
    max_nats: float
    every_updates: int
    deadline_s: float


def fixed_sequences(vocab_size: int, max_tokens: int) -> list[list[int]]:
    """Return random token ids, always the same; empty if an engine takes fewer than two tokens."""
    rng = np.random.default_rng(0)
    lengths = [min(length, max_tokens) for length in _LENGTHS]
    return [rng.integers(vocab_size, size=n).tolist() for n in lengths] if min(lengths) > 1 else []


def mean_difference(expected: Sequence[Scored], logprobs: Sequence[Sequence[float]]) -> float:
    """Return the mean absolute difference over all tokens, nats; NaN if any log-prob is.

    Args:
        expected: the learner's.
        logprobs: the engine's, in the same order and of the same lengths.
    """
    pairs = zip(expected, logprobs, strict=True)
    return float(np.abs(np.concatenate([scored.logprobs - np.asarray(found) for scored, found in pairs])).mean())


class WeightComparison:
    """Compares the parameters that engines store as the learner sends them, bit by bit.

    Many are not: vLLM fuses some, splits them between workers, packs, transposes or quantises them. Those of another
    name, dtype or shape are left out. So are those that differ in all engines the first time: then the values are
    stored in another way, because log-probs agree.
    """

    def __init__(self) -> None:
        self._names: set[str] | None = None

    def wrong(self, expected: Mapping[str, str], engines: Sequence[Sequence[Mapping[str, str]]]) -> list[list[str]]:
        """Return the names of the parameters that differ, for each engine.

        Args:
            expected: the learner's checksums by name, cast to the engines' dtypes (weight_sync/checksums.py).
            engines: those of the workers of each engine.
        """
        differing = [_differing(expected, workers) for workers in engines]
        if self._names is None:
            everywhere = set.intersection(
                *({name for name, differs in engine.items() if differs} for engine in differing)
            )
            self._names = set().union(*differing) - everywhere
            _logger.info("weights: %d parameters are compared bit by bit", len(self._names))
            if everywhere:
                _logger.warning("weights: engines store %s in another way; not compared", ", ".join(sorted(everywhere)))
        return [sorted(self._names & {name for name, differs in engine.items() if differs}) for engine in differing]


def _differing(expected: Mapping[str, str], workers: Sequence[Mapping[str, str]]) -> dict[str, bool]:
    """Say of each parameter that the learner has in the same dtype and shape if it differs in any worker."""
    found: dict[str, bool] = {}
    for worker in workers:
        for name, checksum in worker.items():
            if name in expected and expected[name].rsplit(" ", 1)[0] == checksum.rsplit(" ", 1)[0]:
                found[name] = found.get(name, False) or expected[name] != checksum
    return found
