"""Evaluations by engines of their own: of exported policies, one after the other, while training goes on."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from quatro_ray.telemetry.counters import Counters
from quatro_ray.telemetry.recorder import Recorder
from quatro_ray.types import EvaluationResult, Query

_MAX_PENDING = 2


class BackgroundEvaluation:
    """The books of a run's evaluations, whoever makes them, and the loop of those on engines of their own.

    Args:
        evaluator: evaluator.Evaluator; None: the generators evaluate, and nothing is ever pending.
        folder: for exported policies, `version_N` each, and then their results, `version_N.json`: a checkpoint from
            before them knows only that they are to come.
    """

    def __init__(
        self, evaluator: Any, held_out: Mapping[str, Sequence[Query]], folder: Path, recorder: Recorder, tally: Counters
    ) -> None:
        self._evaluator = evaluator
        self._held_out = held_out
        self._folder = folder
        self._recorder = recorder
        self._tally = tally
        self._pending: list[tuple[int, int]] = []  # version and step, until they are evaluated
        self._changed = asyncio.Event()
        self._fallen: list[tuple[int, int]] = []  # version and step after each fall
        self.newest_step = -1
        """The newest step that is evaluated or will be, of the line that goes on."""

    def path(self, version: int) -> Path:
        return self._folder / f"version_{version}"

    def _results(self, version: int) -> Path:
        return self._folder / f"version_{version}.json"

    async def room(self) -> None:
        """While one is evaluated, one may wait: training is never far ahead. The caller ends the wait."""
        await self._until(lambda: len(self._pending) < _MAX_PENDING)

    def exported(self, version: int, step: int) -> None:
        """Its policy is in `path(version)`."""
        self._pending.append((version, step))
        self._changed.set()
        self.newest_step = step

    async def loop(self) -> None:
        """Consumes exported policies; unblocked by each. Waits without a deadline: there may be none to come."""
        while True:
            await self._until(lambda: len(self._pending) > 0)
            version, step = self._pending[0]
            if not self._is_abandoned(version, step):
                with self._recorder.phase("evaluator", "evaluation"):
                    results = await self._evaluator.evaluate(
                        self.path(version), version, step, self._held_out, self._recorder.note
                    )
                self.add(results)
                writing = self._results(version).with_suffix(".writing")
                writing.write_text(json.dumps([r.to_dict() for r in results]))
                writing.replace(self._results(version))
            shutil.rmtree(self.path(version))
            del self._pending[0]
            self._changed.set()

    async def finish(self) -> None:
        """Until all are evaluated, each within its own deadline."""
        await self._until(lambda: not self._pending)  # no deadline of its own: the loop's evaluations have theirs

    async def _until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            self._changed.clear()
            await self._changed.wait()

    def add(self, results: Sequence[EvaluationResult]) -> None:
        for result in results:
            if not self._is_abandoned(result.version, result.step):
                self._tally.evaluations.append(result)
                self._recorder.evaluation(result)
                self.newest_step = max(self.newest_step, result.step)

    def pending(self) -> list[tuple[int, int]]:
        """For a checkpoint, beside the tally's results."""
        return list(self._pending)

    def take_up(self, pending: Sequence[Sequence[int]]) -> None:
        """What was pending in the checkpoint from which the run goes on; the tally has its results."""
        for version, step in pending:
            if self._results(version).is_file():
                found = json.loads(self._results(version).read_text())
                self._tally.evaluations += [EvaluationResult.from_dict(r) for r in found]
            elif self.path(version).is_dir() and self._evaluator is not None:
                self.exported(version, step)
            else:
                what = "nothing is left of its export" if self._evaluator else "evaluation.num_engines is 0 now"
                self._recorder.event("failed", "evaluation", step=step, version=version, why=f"left out: {what}")
        needed = {self.path(version) for version, _ in self._pending}
        for path in self._folder.glob("version_*"):
            if path.is_dir() and path not in needed:
                shutil.rmtree(path)
        self.newest_step = max([self.newest_step, *(e.step for e in self._tally.evaluations)])

    def fell_back(self, version: int, step: int) -> None:
        """To this step, under a new version; what was evaluated of later ones is taken back."""
        self._fallen.append((version, step))
        self._tally.evaluations = [e for e in self._tally.evaluations if e.step <= step]
        self.newest_step = min(self.newest_step, step)

    def _is_abandoned(self, version: int, step: int) -> bool:
        return any(version < new and step > at for new, at in self._fallen)
