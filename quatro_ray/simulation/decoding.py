"""How long an engine with continuous batching takes, without an event for each token.

All running sequences get one token in each iteration, so one number, `progress`, says how far all of them came.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class EngineSpeed:
    """Seconds of one decoding iteration: `iteration_s` + `sequence_s` · sequences + `context_s` · tokens of context.

    The first is the time to read the weights, the second that of the multiplications for one token, the third the time
    to read the key-value cache of one token.

    Attributes:
        max_num_seqs: sequences that run at the same time; the others wait.
    """

    iteration_s: float
    sequence_s: float
    context_s: float
    max_num_seqs: int


class Batch:
    """The running sequences of an engine.

    Attributes:
        progress: iterations since the engine started; a sequence that began at progress p has `progress` − p tokens.
        num_sampled: tokens sampled since the engine started.
    """

    def __init__(self, speed: EngineSpeed) -> None:
        self._speed = speed
        self._ends: list[tuple[float, int, int]] = []  # progress at the end, number of the sequence, its length
        self._context = 0.0
        self.progress = 0.0
        self.num_sampled = 0.0

    def __len__(self) -> int:
        return len(self._ends)

    def is_full(self) -> bool:
        """Return whether a further sequence has to wait."""
        return len(self) >= self._speed.max_num_seqs

    def add(self, number: int, num_tokens: int) -> None:
        """Begin a sequence that will have so many tokens."""
        heapq.heappush(self._ends, (self.progress + num_tokens, number, num_tokens))

    def seconds_to_next_end(self) -> float:
        """Return how long it takes until a sequence ends, if none is added; infinite if none runs."""
        if not self._ends:
            return math.inf
        iterations = self._ends[0][0] - self.progress
        each, growth = self._iteration_s()
        return iterations * (each + growth * iterations / 2)

    def advance(self, seconds: float) -> None:
        """Decode for so long, but not beyond the next end."""
        if not self._ends:
            return
        each, growth = self._iteration_s()
        # the time of n iterations is each · n + growth · n² / 2, solved for n in a form that allows growth = 0
        iterations = 2 * seconds / (each + math.sqrt(each * each + 2 * growth * seconds))
        self._step(min(iterations, self._ends[0][0] - self.progress))

    def pop_next(self) -> int:
        """Advance to the next end, and return the number of the sequence that ended."""
        self._step(self._ends[0][0] - self.progress)
        _, number, num_tokens = heapq.heappop(self._ends)
        self._context -= num_tokens
        return number

    def is_one_at_its_end(self) -> bool:
        """Return whether a sequence has all its tokens."""
        return bool(self._ends) and self._ends[0][0] <= self.progress + 1e-6

    def _iteration_s(self) -> tuple[float, float]:
        """Return the seconds of the next iteration, and by how much each later one is longer."""
        speed, num = self._speed, len(self._ends)
        return speed.iteration_s + speed.sequence_s * num + speed.context_s * self._context, speed.context_s * num

    def _step(self, iterations: float) -> None:
        self.progress += iterations
        self.num_sampled += iterations * len(self._ends)
        self._context += iterations * len(self._ends)
