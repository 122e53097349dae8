"""The result of an evaluation, as people and evaluations.jsonl get it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class EvaluationResult:
    """The result of one held-out set under one policy version.

    Attributes:
        pass_at: unbiased pass@k by k. pass_at[1] is avg@n: the share of correct responses.
        majority: maj@n, the share of questions whose most frequent answer is correct.
        intervals: 95 % confidence intervals, by `pass_at_K` and `majority`, over questions as a sample of all that
            could be asked (evaluation/metrics.py:interval).
        num_unique_correct: distinct correct answers (text without outer white space), summed over questions.
        truncated_share: share of responses that a limit of tokens or turns ended.
        num_tokens: response tokens that were sampled.
        rollouts: groups of the first questions, in the form of rollouts.jsonl.
    """

    name: str
    version: int
    step: int
    num_queries: int
    samples_per_query: int
    pass_at: dict[int, float]
    majority: float
    intervals: dict[str, tuple[float, float]]
    num_unique_correct: int
    mean_reward: float
    truncated_share: float
    num_tokens: int
    rollouts: tuple[dict[str, object], ...] = ()

    def line(self) -> str:
        """Return the result in one line for people."""
        rates = [f"pass@{k} {rate:.3f}{self._interval(f'pass_at_{k}')}" for k, rate in self.pass_at.items()]
        rates.append(f"maj@{self.samples_per_query} {self.majority:.3f}{self._interval('majority')}")
        return f"{'  '.join(rates)}  ({self.name}, {self.num_queries} held-out questions)"

    def _interval(self, name: str) -> str:
        if name not in self.intervals:  # evaluated before runs had intervals
            return ""
        low, high = self.intervals[name]
        return f" [{low:.2f}, {high:.2f}]"

    def to_dict(self) -> dict[str, object]:
        """Return a JSON object without the rollouts, which `from_dict` reads."""
        return vars(self) | {"pass_at": {str(k): v for k, v in self.pass_at.items()}, "rollouts": ()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EvaluationResult:
        """Restore a result, without its rollouts, from what `to_dict` returned, also before runs had intervals."""
        kept = {name: value for name, value in values.items() if name != "pass_at_1_error"}
        rates = {int(k): v for k, v in values["pass_at"].items()}
        intervals = {name: (low, high) for name, (low, high) in values.get("intervals", {}).items()}
        return cls(**{**kept, "pass_at": rates, "intervals": intervals, "rollouts": ()})

    def record(self) -> dict[str, object]:
        """Return a flat record for evaluations.jsonl."""
        rates = {f"pass_at_{k}": v for k, v in self.pass_at.items()}
        bounds = {f"{name}_interval": list(interval) for name, interval in self.intervals.items()}
        return {
            "set": self.name,
            "version": self.version,
            "step": self.step,
            "num_queries": self.num_queries,
            "n": self.samples_per_query,
            **rates,
            "majority": self.majority,
            **bounds,
            "num_unique_correct": self.num_unique_correct,
            "mean_reward": self.mean_reward,
            "truncated_share": self.truncated_share,
        }
