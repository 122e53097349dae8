"""Defines a simulated workload: lengths of responses, speeds of engines and learner, failures."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from quatro_ray.simulation.decoding import EngineSpeed
from quatro_ray.telemetry.length_bins import bin_width


@dataclass(frozen=True)
class Lengths:
    """Lengths of responses: log-normal, cut at a limit. Responses to one question resemble each other.

    Attributes:
        median: tokens.
        sigma: standard deviation of the logarithm over all responses.
        longest: the limit, tokens.
        between: share of the logarithm's variance that lies between questions.
    """

    median: float
    sigma: float
    longest: int
    between: float = 0.5

    def draw(self, group_id: int, size: int, seed: int) -> list[int]:
        """Return the lengths of a group's responses, the same ones whenever it is generated."""
        rng = np.random.default_rng((seed, group_id))
        common = rng.normal() * self.between**0.5
        normal = common + rng.normal(size=size) * (1 - self.between) ** 0.5
        lengths = np.exp(np.log(self.median) + self.sigma * normal)
        return [int(length) for length in np.clip(np.rint(lengths), 1, self.longest)]


class MeasuredLengths:
    """Lengths with the frequencies of a histogram (telemetry/length_bins.py), each response by itself.

    Args:
        histogram: number of responses by the smallest length of their bin.
    """

    def __init__(self, histogram: Mapping[int, int]) -> None:
        self._smallest = np.array(sorted(histogram))
        self._shares = np.array([histogram[k] for k in self._smallest.tolist()], dtype=float)
        self._shares /= self._shares.sum()
        self._widths = np.array([bin_width(k) for k in self._smallest.tolist()])
        self.longest = int(self._smallest[-1] + self._widths[-1] - 1)

    def draw(self, group_id: int, size: int, seed: int) -> list[int]:
        """Return the lengths of a group's responses, the same ones whenever it is generated."""
        rng = np.random.default_rng((seed, group_id))
        bins = rng.choice(len(self._smallest), size=size, p=self._shares)
        return [max(1, int(n)) for n in self._smallest[bins] + rng.integers(0, self._widths[bins])]


@dataclass(frozen=True)
class Workload:
    """A simulated run beside its configuration, which says how many engines, groups and steps there are.

    Attributes:
        step_s: seconds of an optimiser step beside `token_s`.
        token_s: seconds of an optimiser step for each trained response token, all ranks together.
        transfer_s: seconds of a weight transfer, during which all engines are paused.
        verify_s: seconds to score a group.
        start_s: seconds until a new engine can take weights.
        engine_lives_s: mean time until an engine is lost; None if none is.
        tokens_per_item: tokens that one item of a stored rollout stands for, so that long responses need little memory.
    """

    lengths: Lengths | MeasuredLengths
    engine: EngineSpeed
    step_s: float
    token_s: float
    transfer_s: float = 1.0
    verify_s: float = 0.1
    start_s: float = 60.0
    engine_lives_s: float | None = None
    tokens_per_item: int = 1
    seed: int = 0
    rng: random.Random = field(default_factory=lambda: random.Random(0), compare=False)

    def num_items(self, num_tokens: float) -> int:
        """Return the length of a stored rollout that stands for so many tokens."""
        return max(1, round(num_tokens / self.tokens_per_item))
