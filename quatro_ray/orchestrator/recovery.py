"""Restores the learner from a checkpoint, after its loss and when a run is resumed."""

from __future__ import annotations

import asyncio

from quatro_ray.config import Config
from quatro_ray.engines.checkpoint_store import Checkpoint
from quatro_ray.errors import ClusterError
from quatro_ray.failures import LearnerLost
from quatro_ray.orchestrator.admission import Admission
from quatro_ray.orchestrator.background_evaluation import BackgroundEvaluation
from quatro_ray.orchestrator.checkpoint_writer import CheckpointWriter
from quatro_ray.orchestrator.components import Components
from quatro_ray.orchestrator.learner_monitor import LearnerMonitor
from quatro_ray.orchestrator.position import Position
from quatro_ray.replay.buffer import RecoveredState
from quatro_ray.telemetry.counters import Counters
from quatro_ray.telemetry.recorder import Recorder


class Recovery:
    """Restores the learner and the controller's state; call every method with the learner's lock held."""

    def __init__(
        self,
        config: Config,
        components: Components,
        position: Position,
        admission: Admission,
        monitor: LearnerMonitor,
        writer: CheckpointWriter,
        evaluation: BackgroundEvaluation,
        counters: Counters,
        recorder: Recorder,
    ) -> None:
        self._config = config
        self._components = components
        self._position = position
        self._admission = admission
        self._monitor = monitor
        self._writer = writer
        self._evaluation = evaluation
        self._counters = counters
        self._recorder = recorder
        self._furthest_step, self._restarts_in_a_row = 0, 0
        self._is_resuming = False  # until the state of the earlier process is restored

    def step_made(self, step: int) -> None:
        """Reset the count of restarts if `step` is a new maximum."""
        if step > self._furthest_step:
            self._furthest_step, self._restarts_in_a_row = step, 0

    async def resume(self) -> None:
        """Continue an earlier run from its newest complete checkpoint, or from the starting policy."""
        found = await self._recover_replay()
        self._position.issue(found.newest_version)
        self._admission.restore(found.next_id, found.num_admitted)
        self._is_resuming = True
        try:
            await self._fall_back("resumed")
        except LearnerLost as lost:
            await self.restart_learner(str(lost))
        self._counters.run_resumed(found.num_tokens)

    async def restart_learner(self, why: str) -> None:
        """Restart all ranks from the newest checkpoint.

        Args:
            why: the reason for the loss, for events and messages.

        Raises:
            ClusterError: the learner was lost `learner.max_restarts` + 1 times without a new step.
        """
        while (failure := await self._try_restart(why)) is not None:
            why = failure
        self._counters.learner_restarted()
        self._recorder.event("recovered", "learner", version=self._position.version, step=self._position.step)

    async def _try_restart(self, why: str) -> str | None:
        """Return None if the learner runs, or the reason for which it was lost again."""
        self._recorder.event("lost", "learner", why=why)
        self._restarts_in_a_row += 1
        if self._restarts_in_a_row > (limit := self._config.learner.max_restarts):
            raise ClusterError(
                f"the learner was lost {limit + 1} times and did not get past step {self._furthest_step}; the last "
                f"time: {why}"
            )
        self._components.weight_sync.disconnect()
        with self._recorder.phase("learner", "restart"):
            try:
                await self._components.learner.restart()
                self._monitor.restarted()
                await self._fall_back(why)
            except LearnerLost as lost:
                return str(lost)
        return None

    async def _fall_back(self, why: str) -> None:
        """Load the newest checkpoint under a new version; groups since then are trained again.

        Groups in progress are cancelled and started again, because their tokens are of an abandoned policy.
        """
        checkpoint = await asyncio.to_thread(self._components.checkpoints.newest, self._damaged)
        async with self._admission.suspended():
            await self._recover_replay()
            known, at = self._position.issued, checkpoint.version if checkpoint else 0
            back = await self._components.replay.fall_back(at, known)
            self._position.issue(back.version)
            if checkpoint is None:
                await self._components.learner.set_version(back.version)
            else:
                await self._components.learner.load_checkpoint(checkpoint.path, back.version)
            await self._rewind(checkpoint, back.step)
            self._recorder.event(
                "fell_back", "learner", why=why, version=back.version, step=back.step, ready=back.num_ready,
                pending=back.num_pending, checkpoint=checkpoint.path.name if checkpoint else None,
            )  # fmt: skip
            update = await self._components.weight_sync.update(back.version)
        self._position.move(update.version, back.step)
        self._admission.capacity_changed()

    async def _recover_replay(self) -> RecoveredState:
        found = await self._components.replay.recover()
        if found.num_damaged:
            why = f"the stored rollouts of {found.num_damaged} groups cannot be read; those still needed are made again"
            self._recorder.event("damaged", "ledger", why=why)
        return found

    def _damaged(self, what: str) -> None:
        self._recorder.event("damaged", "checkpoint", why=what)

    async def _rewind(self, checkpoint: Checkpoint | None, step: int) -> None:
        """Remove what was counted and recorded of abandoned steps."""
        is_restored = self._is_resuming and checkpoint is not None
        if is_restored and checkpoint is not None:
            self._counters.restore(checkpoint.state["tally"])
            self._evaluation.resume(checkpoint.state.get("to_evaluate", []))
        steps = checkpoint.state["tally"]["steps"] if checkpoint else None
        self._counters.rewind(max(0, self._position.step - step), steps)
        self._evaluation.fell_back(self._position.issued, step)
        self._writer.fell_back(checkpoint.step if checkpoint else 0, step, is_export_known=not is_restored)
        # in a thread, because the records of a long run are large
        await asyncio.to_thread(self._recorder.rewind, step, {e.step for e in self._counters.evaluations})
        self._is_resuming = False
