"""Counters that the controller keeps independently of the ledger, to be compared with it; checkpoints hold them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from quatro_ray.telemetry.evaluation_result import EvaluationResult
from quatro_ray.types import GenerationSummary, GroupSummary


@dataclass
class DroppedGroups:
    """Groups that were dropped for one reason since the last `read`.

    Attributes:
        num_measured: responses whose length is known; a group that was never generated has none.
        num_tokens: response tokens of these.
        num_scored: responses that were scored.
        num_correct: correct ones of these.
    """

    num_groups: int = 0
    num_measured: int = 0
    num_tokens: int = 0
    num_scored: int = 0
    num_correct: int = 0

    def metrics(self, reason: str) -> dict[str, float]:
        """Return the number of groups, and mean length and pass rate where they are known."""
        metrics: dict[str, float] = {f"drops/{reason}": self.num_groups}
        if self.num_measured:
            metrics[f"drops/{reason}_response_tokens_mean"] = self.num_tokens / self.num_measured
        if self.num_scored:
            metrics[f"drops/{reason}_pass_rate"] = self.num_correct / self.num_scored
        return metrics


@dataclass
class RecentCounters:
    """Counts since the last `read`, which is at each step. What did not happen since then gives no metric.

    Attributes:
        outcomes: rollouts by how their scoring ended, those of groups that were filtered out included.
        drops: dropped groups by reason; expired ones are counted by the replay buffer.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    drops: defaultdict[str, DroppedGroups] = field(default_factory=lambda: defaultdict(DroppedGroups))

    def read(self) -> dict[str, float]:
        """Return the metrics and reset all counts."""
        num = self.outcomes.total()
        metrics = {f"verifier/{name}_share": n / num for name, n in self.outcomes.items() if name != "ok" and num}
        for reason, dropped in self.drops.items():
            metrics |= dropped.metrics(reason)
        self.outcomes.clear()
        self.drops.clear()
        return metrics


@dataclass
class StepCounters:
    """Counts of the steps in the policy's lineage. When the policy falls back to a checkpoint, so do they.

    Attributes:
        skipped_steps: batches of which no step was applied, because loss or gradient was not finite.
        uninformative_steps: batches of which no step was taken, because no query preferred anything.
    """

    trained_tokens: int = 0
    learner_steps: int = 0
    skipped_steps: int = 0
    uninformative_steps: int = 0
    weight_updates: int = 0
    in_flight_updates: int = 0
    staleness_tokens: Counter[int] = field(default_factory=Counter)

    def add(self, metrics: Mapping[str, Any], num_in_flight: int) -> None:
        """Count an optimiser step during whose weight update `num_in_flight` groups were being generated."""
        self.learner_steps += 1
        self.skipped_steps += int(metrics["step/skipped"])
        self.uninformative_steps += int(metrics["step/uninformative"])
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
    recent: RecentCounters = field(default_factory=RecentCounters)
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
        """Return a JSON object for a checkpoint, without the recent counts."""
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
        self.recent.outcomes.update(summary.outcomes)

    def dropped(self, reason: str, generated: GenerationSummary | None, scored: GroupSummary | None, size: int) -> None:
        """Count a dropped group.

        Args:
            reason: a DropReason.
            generated: None if the group was not generated.
            scored: None if the group was not scored.
            size: number of its responses.
        """
        dropped = self.recent.drops[str(reason)]
        dropped.num_groups += 1
        if generated is not None:
            dropped.num_measured += size
            dropped.num_tokens += generated.num_tokens
        if scored is not None:
            dropped.num_scored += size
            dropped.num_correct += sum(scored.correct)

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
