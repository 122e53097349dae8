"""A learner and verifiers that only take time."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from quatro_ray.engines.checkpoint_store import Digests, digest_files
from quatro_ray.failures import EngineLost, TransferFailed
from quatro_ray.replay.buffer import LeasedBatch
from quatro_ray.simulation.engine import SimulatedEngine
from quatro_ray.simulation.workload import Workload
from quatro_ray.telemetry.activity import Activity
from quatro_ray.types import GroupSummary, RolloutGroup, Score, StepMetrics


class SimulatedLearner:
    """Implements actors/interfaces.py:Learner in virtual time; it is never lost."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._engines: list[SimulatedEngine] = []

    async def train_step(self, leased: object, version: int) -> StepMetrics:
        """Take the time of a step, and return the metrics that the controller reads."""
        batch = cast(LeasedBatch, leased)
        items = sum(group.num_tokens for group in batch.groups)
        await asyncio.sleep(self._workload.step_s + self._workload.token_s * items * self._workload.tokens_per_item)
        by_version: Counter[int] = Counter()
        for span in (span for group in batch.groups for rollout in group.rollouts for span in rollout.spans):
            by_version[span.version] += span.end - span.start
        ages_of = batch.lineage.staleness(np.array(list(by_version))).tolist()
        ages: Counter[int] = Counter()
        for age, num in zip(ages_of, by_version.values(), strict=True):
            ages[age] += num
        return {
            "tokens/trained": items * self._workload.tokens_per_item,
            "off_policy/staleness_tokens": dict(ages),
            "off_policy/staleness_mean": sum(age * num for age, num in ages.items()) / items,
            "off_policy/staleness_max": max(ages),
            "policy/realised_kl_nats": [0.0],
            "policy/entropy": 0.0,
            "reward/mean": 0.0,
            "step/skipped": 0.0,
            "step/uninformative": 0.0,
        }

    async def open_transfer(self, engines: Sequence[Any]) -> None:
        """Connect to exactly these engines."""
        self._engines = list(engines)

    async def send_weights(self, version: int) -> None:
        """Take the time of a transfer; raise TransferFailed if an engine is gone."""
        await asyncio.sleep(self._workload.transfer_s)
        try:
            for engine in self._engines:
                engine.receive(version)
        except EngineLost as error:
            raise TransferFailed(f"an engine is gone: {error}") from error

    async def save_checkpoint(self, folder: Path, deadline_s: float) -> Digests:
        """Write a file that stands for the checkpoint."""
        (folder / "weights").write_text("none")
        return digest_files(folder)

    async def load_checkpoint(self, folder: Path, version: int) -> None:
        """Do nothing: there are no weights."""

    async def set_version(self, version: int) -> None:
        """Do nothing: there are no weights."""

    async def export(self, path: Path, deadline_s: float) -> None:
        """Make the folder."""
        path.mkdir(parents=True, exist_ok=True)

    async def restart(self) -> None:
        """Do nothing."""

    async def watch(self, liveness_deadline_s: float) -> str:
        """Wait until it is cancelled."""
        await asyncio.Event().wait()
        return ""

    async def stacks(self) -> list[str]:
        """Return what it does."""
        return ["simulated"]


class SimulatedVerifiers:
    """Implements actors/interfaces.py:Verifiers in virtual time: any number of groups at once, and each reward is 1."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self.num_replaced = 0
        self.activity = Activity()

    async def score(self, group: object) -> tuple[GroupSummary, Any]:
        """Return the summary and the group with scores; the reference is the group itself."""
        made = cast(RolloutGroup, group)
        await asyncio.sleep(self._workload.verify_s)
        size = len(made.rollouts)
        scored = replace(made, rollouts=tuple(replace(r, score=Score(1.0)) for r in made.rollouts))
        summary = GroupSummary(
            rewards=(1.0,) * size,
            reward_values=({},) * size,
            outcomes={"ok": size},
            answers=("",) * size,
            correct=(True,) * size,
            truncated=0,
            turns=(1,) * size,
            response_tokens=tuple(r.num_tokens for r in made.rollouts),
        )
        return summary, scored
