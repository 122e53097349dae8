"""Results of all evaluations in a run, and the loop that evaluates exported policies on dedicated engines."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from quatro_ray.files import replace_file
from quatro_ray.telemetry.activity import Activity
from quatro_ray.telemetry.counters import Counters
from quatro_ray.telemetry.evaluation_result import EvaluationResult
from quatro_ray.telemetry.recorder import Recorder
from quatro_ray.types import Query

_MAX_PENDING = 2


class DedicatedEvaluator(Protocol):
    """Evaluates a policy on engines of its own (evaluation/evaluator.py)."""

    async def evaluate(
        self,
        model_path: Path | str,
        version: int,
        step: int,
        held_out: Mapping[str, Sequence[Query]],
        note: Callable[[str], None],
    ) -> list[EvaluationResult]:
        """Evaluate a policy, and return one result per data source.

        Args:
            model_path: folder of the policy in Hugging Face format.
            version: version of the policy, for the results.
            step: optimiser steps of the policy, for the results.
            held_out: queries by data source.
            note: receives lines for notes.log.
        """
        ...


class BackgroundEvaluation:
    """Keeps the results of all evaluations in a run, and evaluates exported policies one after the other.

    Args:
        evaluator: None if evaluation runs on the training generators; then nothing is ever pending.
        held_out: queries by data source.
        folder: holds exported policies as `version_N`, and their results as `version_N.json`. A checkpoint that was
            written before an evaluation ended refers to these results.
    """

    def __init__(
        self,
        evaluator: DedicatedEvaluator | None,
        held_out: Mapping[str, Sequence[Query]],
        folder: Path,
        recorder: Recorder,
        counters: Counters,
    ) -> None:
        self._evaluator = evaluator
        self._held_out = held_out
        self._folder = folder
        self._recorder = recorder
        self._counters = counters
        self._pending: list[tuple[int, int]] = []  # (version, step), until they are evaluated
        self._changed = asyncio.Event()
        self._fallen: list[tuple[int, int]] = []  # (version, step) after each fall-back
        if evaluator is not None:
            recorder.watch("evaluator", Activity())
        self.newest_step = -1
        """The newest step of the current lineage that is evaluated or pending."""

    def path(self, version: int) -> Path:
        """Return the folder for the exported policy of `version`."""
        return self._folder / f"version_{version}"

    def _results(self, version: int) -> Path:
        return self._folder / f"version_{version}.json"

    async def wait_for_capacity(self) -> None:
        """Wait until at most one policy is waiting besides the one being evaluated. The caller bounds the wait."""
        await self._until(lambda: len(self._pending) < _MAX_PENDING)

    def exported(self, version: int, step: int) -> None:
        """Queue the policy that was exported to `path(version)`."""
        self._pending.append((version, step))
        self._changed.set()
        self.newest_step = step

    async def loop(self) -> None:
        """Consume exported policies. Waits for an export, without a deadline: there may be none to come."""
        assert self._evaluator is not None
        while True:
            await self._until(lambda: len(self._pending) > 0)
            version, step = self._pending[0]
            if not self._is_abandoned(version, step):
                with self._recorder.phase("evaluator", "evaluation"):
                    results = await self._evaluator.evaluate(
                        self.path(version), version, step, self._held_out, self._recorder.note
                    )
                self.add(results)
                replace_file(self._results(version), json.dumps([r.to_dict() for r in results]))
            shutil.rmtree(self.path(version))
            del self._pending[0]
            self._changed.set()

    async def finish(self) -> None:
        """Wait until all pending policies are evaluated; each evaluation has its own deadline."""
        await self._until(lambda: not self._pending)

    async def _until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            self._changed.clear()
            await self._changed.wait()

    def add(self, results: Sequence[EvaluationResult]) -> None:
        """Record results, except those of abandoned versions."""
        for result in results:
            if not self._is_abandoned(result.version, result.step):
                self._counters.evaluations.append(result)
                self._recorder.evaluation(result)
                self.newest_step = max(self.newest_step, result.step)

    def pending(self) -> list[tuple[int, int]]:
        """Return (version, step) of each pending policy, for a checkpoint."""
        return list(self._pending)

    def resume(self, pending: Sequence[Sequence[int]]) -> None:
        """Continue the evaluations that were pending in a checkpoint; the counters hold the earlier results.

        Args:
            pending: (version, step) of each.
        """
        for version, step in pending:
            if self._results(version).is_file():
                found = json.loads(self._results(version).read_text())
                self._counters.evaluations += [EvaluationResult.from_dict(r) for r in found]
            elif self.path(version).is_dir() and self._evaluator is not None:
                self.exported(version, step)
            else:
                what = "nothing is left of its export" if self._evaluator else "evaluation.num_engines is 0 now"
                self._recorder.event("failed", "evaluation", step=step, version=version, why=f"left out: {what}")
        needed = {self.path(version) for version, _ in self._pending}
        for path in self._folder.glob("version_*"):
            if path.is_dir() and path not in needed:
                shutil.rmtree(path)
        self.newest_step = max([self.newest_step, *(e.step for e in self._counters.evaluations)])

    def fell_back(self, version: int, step: int) -> None:
        """Remove the results of later steps, after the learner fell back to `step` under the new `version`."""
        self._fallen.append((version, step))
        self._counters.forget_evaluations_after(step)
        self.newest_step = min(self.newest_step, step)

    def _is_abandoned(self, version: int, step: int) -> bool:
        return any(version < new and step > at for new, at in self._fallen)
