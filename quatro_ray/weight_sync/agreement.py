"""Measures whether engines and learner hold the same policy: both score the same token sequences.

Shape letters: T tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

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
