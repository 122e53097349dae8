"""Counters that the controller keeps independently of the ledger, to be compared with it; checkpoints hold them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from quatro_ray.types import EvaluationResult, GenerationSummary, GroupSummary


@dataclass
class RewardCounters:
    """Counts of the rollouts scored since the last `read`.

    Attributes:
        values: values of each reward by its name.
        outcomes: rollouts by how their scoring ended.
    """

    values: dict[str, list[float]] = field(default_factory=dict)
    outcomes: Counter[str] = field(default_factory=Counter)
    num_truncated: int = 0
    num_turns: int = 0

    def add(self, summary: GroupSummary) -> None:
        """Count a scored group."""
        for values in summary.reward_values:
            for name, value in values.items():
                self.values.setdefault(name, []).append(value)
        self.outcomes.update(summary.outcomes)
        self.num_truncated += summary.truncated
        self.num_turns += sum(summary.turns)

    def read(self) -> dict[str, float]:
        """Return the metrics and reset all counts."""
        num = max(1, self.outcomes.total())
        metrics = {f"reward/part_{name}": sum(v) / len(v) for name, v in self.values.items()}
        metrics |= {f"verifier/{name}_share": n / num for name, n in self.outcomes.items() if name != "ok"}
        metrics["rollout/truncated_share"] = self.num_truncated / num
        metrics["rollout/turns"] = self.num_turns / num
        self.values, self.outcomes, self.num_truncated, self.num_turns = {}, Counter(), 0, 0
        return metrics


@dataclass
class StepCounters:
    """Counts of the steps in the policy's lineage. When the policy falls back to a checkpoint, so do they."""

    trained_tokens: int = 0
    learner_steps: int = 0
    skipped_steps: int = 0
    weight_updates: int = 0
    in_flight_updates: int = 0
    staleness_tokens: Counter[int] = field(default_factory=Counter)

    def add(self, metrics: Mapping[str, Any], num_in_flight: int) -> None:
        """Count an optimiser step during whose weight update `num_in_flight` groups were being generated."""
        self.learner_steps += 1
        self.skipped_steps += int(metrics["step/skipped"])
        self.weight_updates += 1
        self.in_flight_updates += num_in_flight > 0
        self.trained_tokens += metrics["tokens/trained"]
        self.staleness_tokens.update(metrics["off_policy/staleness_tokens"])

    def to_dict(self) -> dict[str, object]:
        """Return a JSON object for a checkpoint."""
        return vars(self) | {"staleness_tokens": {str(k): v for k, v in self.staleness_tokens.items()}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StepCounters:
        """Restore what `to_dict` returned."""
        staleness = Counter({int(k): v for k, v in values["staleness_tokens"].items()})
        return cls(**{**values, "staleness_tokens": staleness})


@dataclass
class Counters:
    """All counts of a run.

    Attributes:
        multi_version_rollouts: rollouts whose tokens were sampled under more than one policy version.
        steps_lost: optimiser steps that were made and then abandoned.
        groups_requeued: groups that were given to another engine.
        groups_continued: requeued groups that the other engine continued from their partial rollouts.
        resumed: number of times that the run was resumed.
    """

    steps: StepCounters = field(default_factory=StepCounters)
    generated_tokens: int = 0
    multi_version_rollouts: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    rewards: RewardCounters = field(default_factory=RewardCounters)
    evaluations: list[EvaluationResult] = field(default_factory=list)
    learner_restarts: int = 0
    steps_lost: int = 0
    groups_requeued: int = 0
    groups_continued: int = 0
    resumed: int = 0

    _COUNTS: ClassVar[tuple[str, ...]] = (
        "generated_tokens", "multi_version_rollouts", "learner_restarts", "steps_lost", "groups_requeued",
        "groups_continued", "resumed",
    )  # fmt: skip

    def to_dict(self) -> dict[str, object]:
        """Return a JSON object for a checkpoint, without the rewards of the current step."""
        return {
            "steps": self.steps.to_dict(),
            "outcomes": dict(self.outcomes),
            "evaluations": [e.to_dict() for e in self.evaluations],
            **{name: getattr(self, name) for name in self._COUNTS},
        }

    def restore(self, values: Mapping[str, Any]) -> None:
        """Restore what `to_dict` returned."""
        self.steps = StepCounters.from_dict(values["steps"])
        self.outcomes = Counter(values["outcomes"])
        self.evaluations = [EvaluationResult.from_dict(e) for e in values["evaluations"]]
        for name in self._COUNTS:
            setattr(self, name, values.get(name, 0))  # older checkpoints lack some

    def generated(self, summary: GenerationSummary) -> None:
        """Count a group that was generated."""
        self.generated_tokens += summary.num_tokens
        self.multi_version_rollouts += summary.multi_version_rollouts

    def scored(self, summary: GroupSummary) -> None:
        """Count a group that was scored."""
        self.outcomes.update(summary.outcomes)
        self.rewards.add(summary)

    def requeued(self, *, continued: bool) -> None:
        """Count a group whose engine died; `continued`: another engine continues it from the tokens so far."""
        self.groups_requeued += 1
        self.groups_continued += continued

    def learner_restarted(self) -> None:
        """Count a restart of all learner ranks."""
        self.learner_restarts += 1

    def run_resumed(self, num_tokens: int) -> None:
        """Count a resumption; `num_tokens`: a lower bound of what was generated, which the checkpoint may not have."""
        self.generated_tokens = max(self.generated_tokens, num_tokens)
        self.resumed += 1

    def rewind(self, num_lost: int, steps: Mapping[str, Any] | None) -> None:
        """Return the step counters to those of a checkpoint, or to zero if `steps` is None.

        Args:
            num_lost: optimiser steps that are abandoned.
            steps: the step counters as `to_dict` returned them.
        """
        self.steps_lost += num_lost
        self.steps = StepCounters() if steps is None else StepCounters.from_dict(steps)

    def forget_evaluations_after(self, step: int) -> None:
        """Remove the results of later steps, which are abandoned."""
        self.evaluations = [e for e in self.evaluations if e.step <= step]

    def health(self) -> dict[str, float]:
        """Return the counts of losses since the run began, as metrics."""
        names = ("learner_restarts", "steps_lost", "groups_requeued", "groups_continued", "resumed")
        return {f"health/{name}": float(getattr(self, name)) for name in names}
