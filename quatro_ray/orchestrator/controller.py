"""The loops that turn the ring. Each says what it consumes, what it waits for, and what unblocks it.

Written against small interfaces: on a cluster they are actors (actors/generator_client.py), in tests plain objects.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from quatro_ray.actors.fleet import Fleet
from quatro_ray.config import Config
from quatro_ray.data.dataset import QueryStream
from quatro_ray.engines.checkpoint_store import Checkpoint, CheckpointStore
from quatro_ray.errors import CheckpointError, ClusterError, Preempted, QuatroError, StallError
from quatro_ray.evaluation.evaluator import Evaluator, evaluate_set
from quatro_ray.evaluation.sampler import Sampler
from quatro_ray.failures import LearnerLost
from quatro_ray.orchestrator.background_evaluation import BackgroundEvaluation
from quatro_ray.orchestrator.checkpoint_writer import CheckpointWriter
from quatro_ray.orchestrator.group_runner import GroupRunner
from quatro_ray.orchestrator.learner_monitor import LearnerMonitor
from quatro_ray.orchestrator.stall_report import stall_report
from quatro_ray.telemetry.counters import Counters, StepCounters
from quatro_ray.telemetry.recorder import Recorder
from quatro_ray.timeouts import Overtaken, unless, within
from quatro_ray.types import Query
from quatro_ray.weight_sync.coordinator import Update, WeightSyncCoordinator


@dataclass(frozen=True)
class Components:
    """What the controller drives."""

    generators: Fleet
    verifiers: Any  # actors.verifier_pool.VerifierPool
    replay: Any  # actors.clients.ReplayClient
    learner: Any  # actors.learner_group.LearnerGroup
    weight_sync: WeightSyncCoordinator
    checkpoints: CheckpointStore
    evaluator: Evaluator | None = None
    """null: the generators evaluate."""


class Controller:
    """`version` is the policy that the engines have, `step` its optimiser steps; versions only ever go up."""

    def __init__(
        self,
        config: Config,
        parts: Components,
        queries: QueryStream,
        held_out: Mapping[str, Sequence[Query]],
        recorder: Recorder,
    ) -> None:
        self._config = config
        self._parts = parts
        self._queries = queries
        self._held_out = held_out
        self._recorder = recorder
        self.version = 0
        self.step = 0
        self.tally = Counters()
        self._maker = GroupRunner(config, parts.generators, parts.verifiers, parts.replay, recorder, self.tally)
        self._issued = 0  # the newest version there is; above `version` between a commit and the update after it
        self._next_id = 1
        self._idle: deque[tuple[int, Query]] = deque()  # pending groups that nobody works on
        self._active: dict[int, asyncio.Task[None]] = {}  # who works on which group
        self._learner = asyncio.Lock()
        self._admitting = asyncio.Lock()
        self._room = asyncio.Event()
        # for who waits for groups: one is ready, the learner is lost, or the run is to end
        self._wake = asyncio.Event()
        self._watch = LearnerMonitor(parts.learner, config.cluster.liveness_deadline_s, self._wake.set)
        self._told_to_stop = asyncio.Event()
        self._resuming = False
        self._furthest, self._restarts_in_a_row = 0, 0  # the newest step ever made, and restarts since then
        folder = config.run.dir / "evaluating"
        self.evaluations = BackgroundEvaluation(parts.evaluator, held_out, folder, recorder, self.tally)
        self._keeper = CheckpointWriter(
            config, parts.checkpoints, parts.replay, parts.learner, self._learner, recorder, self._to_keep
        )

    # Beginning and end

    async def run(self, *, resume: bool = False) -> Counters:
        """Trains until `run.num_steps` steps are done.

        Args:
            resume: the ledger is one of an earlier run, which goes on from the newest checkpoint.

        Raises:
            QuatroError: with a message for people; also a failed part, named.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                background = [tasks.create_task(loop) for loop in (self._join_loop(), self._watch.loop())]
                background.append(tasks.create_task(self._grace_loop()))
                self._parts.generators.started(synced=not resume)
                self._parts.generators.supervise(tasks, self._recorder)
                if resume:
                    await self._resume()
                background.append(tasks.create_task(self._generate_loop(tasks)))
                if self._parts.evaluator is not None:
                    background.append(tasks.create_task(self._evaluation_loop()))
                await self._learn_loop()
                await self._finish_evaluations()
                async with self._learner:  # an engine that is brought weights is not left with half of them
                    self._parts.generators.close()
                for task in [*background, *self._active.values()]:
                    task.cancel()
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from group
        await self._parts.replay.end_run()
        return self.tally

    def stop(self) -> None:
        """Asks for an end: after the step under way, with a checkpoint. From a signal handler."""
        self._told_to_stop.set()
        self._wake.set()

    async def _grace_loop(self) -> None:
        """Ends the run where it was told to end and did not within `checkpoint.grace_s`."""
        await self._told_to_stop.wait()
        await asyncio.sleep(grace := self._config.checkpoint.grace_s)
        raise Preempted(
            f"told to end, and no checkpoint was complete within checkpoint.grace_s={grace:g} s: with run.resume=auto "
            "the run goes on from an earlier one"
        )

    async def _resume(self) -> None:
        """From the newest checkpoint that is whole, or from the starting policy."""
        found = await self._parts.replay.recover()
        self._next_id, self._issued = found["next_id"], found["newest"]
        self._queries.restore(self._queries.state() | found["num_admitted"])
        self._resuming = True
        async with self._learner:
            try:
                await self._fall_back("resumed")
            except LearnerLost as lost:
                await self._restart_learner(str(lost))
        # groups that were made after the checkpoint are there, and it has not counted them
        self.tally.generated_tokens = max(self.tally.generated_tokens, found["num_tokens"])
        self.tally.resumed += 1

    # Generation

    async def _generate_loop(self, tasks: asyncio.TaskGroup) -> None:
        """Consumes pending groups, then queries. Waits for capacity; unblocked by a new version or by a drop."""
        while True:
            self._room.clear()
            async with self._admitting:
                room = await self._parts.replay.capacity(self.version, len(self._idle))
                started = [self._idle.popleft() for _ in range(min(room, len(self._idle)))]
                started += await self._admit(room - len(started))
                for group_id, query in started:
                    self._active[group_id] = tasks.create_task(self._life(group_id, query))
            await self._room.wait()  # no stall of its own: the learner's wait holds the deadline

    async def _admit(self, count: int) -> list[tuple[int, Query]]:
        if not count:
            return []
        queries = [next(self._queries) for _ in range(count)]
        group_ids = await self._parts.replay.admit(self._next_id, queries, self.version)
        self._next_id += count
        return list(zip(group_ids, queries, strict=True))

    async def _life(self, group_id: int, query: Query) -> None:
        """One group from pending to ready or dropped; a drop makes room for another."""
        try:
            reason = await self._maker.make(group_id, query)
        finally:
            del self._active[group_id]
        (self._wake if reason is None else self._room).set()

    # Learning

    async def _learn_loop(self) -> None:
        """Consumes ready groups, B a step. Waits for them; unblocked by each group that becomes ready."""
        while True:
            try:
                await self._periodic()
                if self.step == self._config.run.num_steps:
                    return
                with self._recorder.phase("learner", "wait"):
                    lease, leased = await self._lease()
                async with self._learner:
                    self._watch.check()
                    await self._step(lease, leased)
            except LearnerLost as lost:
                async with self._learner:
                    await self._restart_learner(str(lost))

    async def _step(self, lease: Mapping[str, Any], leased: Any) -> None:
        with self._recorder.phase("learner", "train"):
            metrics = await self._parts.learner.train_step(leased, self.version)
        self._issued = await self._parts.replay.commit(self.version)
        with self._recorder.phase("learner", "sync"):
            update = await self._parts.weight_sync.update(self._issued)
        self._now_at(update.version, self.step + 1)
        if self.step > self._furthest:
            self._furthest, self._restarts_in_a_row = self.step, 0
        self.tally.steps.add(metrics, update.num_in_flight)
        metrics |= self.tally.rewards.read() | lease["metrics"] | _timing(update) | self.tally.health()
        metrics["health/verifiers_replaced"] = float(self._parts.verifiers.num_replaced)
        metrics["health/engines"] = float(self._parts.generators.num_healthy())
        metrics["health/engines_lost"] = float(self._parts.generators.num_lost)
        self._recorder.step(self.step, metrics, lease["samples"])

    def _now_at(self, version: int, step: int) -> None:
        self.version, self.step = version, step
        self._room.set()

    async def _lease(self) -> tuple[dict[str, Any], Any]:
        """Raises LearnerLost where it died while there was nothing to do; StallError past the deadline."""
        deadline = self._config.cluster.stall_deadline_s
        while True:
            self._wake.clear()
            self._watch.check()
            if self._told_to_stop.is_set():
                await self._end_early()
            samples = self._config.telemetry.rollout_groups_per_step
            summary, leased = await self._parts.replay.lease(self.version, samples)
            self._room.set()  # groups that expired have made room
            if summary is not None:
                return summary, leased
            try:
                await within(deadline, self._wake.wait())
            except TimeoutError as error:
                report = await stall_report(self._parts, self._config.run.dir, self.version)
                raise StallError(f"no group became ready for {deadline:g} s. {report}") from error

    async def _end_early(self) -> None:
        """Raises Preempted, with a checkpoint written before."""
        await self._keeper.keep(is_early=True)
        written = "a checkpoint is written" if self._keeper.saved == self.step else "no checkpoint could be written"
        raise Preempted(
            f"told to end after step {self.step} of {self._config.run.num_steps}; {written}, and the same command with "
            "run.resume=auto goes on"
        )

    def _to_keep(self) -> tuple[int, int, dict[str, Any]]:
        return self.step, self.version, {"tally": self.tally.to_dict(), "to_evaluate": self.evaluations.pending()}

    # Falling back

    async def _restart_learner(self, why: str) -> None:
        """All ranks, from the newest checkpoint. Raises ClusterError where that does not help."""
        self._recorder.event("lost", "learner", why=why)
        self._restarts_in_a_row += 1
        if self._restarts_in_a_row > (limit := self._config.learner.max_restarts):
            raise ClusterError(
                f"the learner was lost {limit + 1} times without coming further than step {self._furthest}; the last "
                f"time: {why}"
            )
        self._parts.weight_sync.disconnect()
        with self._recorder.phase("learner", "restart"):
            try:
                await self._parts.learner.restart()
                self._watch.restarted()
                await self._fall_back(why)
            except LearnerLost as lost:
                return await self._restart_learner(str(lost))
        self.tally.learner_restarts += 1
        self._recorder.event("recovered", "learner", version=self.version, step=self.step)

    async def _fall_back(self, why: str) -> None:
        """The learner, new, takes up the newest checkpoint under a new version; groups since then are trained again.

        What is under way is given up and begun again: its tokens are of a policy that is abandoned.
        """
        damaged = partial(self._recorder.event, "damaged", "checkpoint")
        checkpoint = await asyncio.to_thread(self._parts.checkpoints.newest, lambda what: damaged(why=what))
        async with self._admitting:
            await _cancelled(list(self._active.values()))
            await self._parts.replay.recover()
            back = await self._parts.replay.fall_back(checkpoint.version if checkpoint else 0, self._issued)
            self._issued = back.version
            if checkpoint is None:
                await self._parts.learner.set_version(back.version)
            else:
                await self._parts.learner.load_checkpoint(checkpoint.path, back.version)
            self._restore(checkpoint, back.step)
            self._recorder.event(
                "fell_back", "learner", why=why, version=back.version, step=back.step, ready=back.num_ready,
                pending=back.num_pending, checkpoint=checkpoint.path.name if checkpoint else None,
            )  # fmt: skip
            update = await self._parts.weight_sync.update(back.version)
            self._idle = deque(await self._parts.replay.pending())
            self._now_at(update.version, back.step)

    def _restore(self, checkpoint: Checkpoint | None, step: int) -> None:
        """What was counted and recorded of steps that are abandoned is taken back."""
        exported = min(self._keeper.exported, step)
        if self._resuming and checkpoint is not None:
            exported = -1  # whether it is whole is not known
            self.tally.restore(checkpoint.state["tally"])
            self.evaluations.take_up(checkpoint.state.get("to_evaluate", []))
        self.tally.steps_lost += max(0, self.step - step)
        self.tally.steps = StepCounters.from_dict(checkpoint.state["tally"]["steps"]) if checkpoint else StepCounters()
        self.evaluations.fell_back(self._issued, step)
        self._keeper.saved, self._keeper.exported = (checkpoint.step if checkpoint else 0), exported
        self._recorder.rewind(step, {e.step for e in self.tally.evaluations})
        self._resuming = False

    async def _join_loop(self) -> None:
        """Consumes engines that were started again. Waits until the learner is free, and brings them its weights."""
        joining = self._parts.generators.joining
        while True:
            await joining.wait()
            joining.clear()
            async with self._learner:
                if not self._parts.generators.is_any_waiting():
                    continue  # a step's own update was faster
                with suppress(LearnerLost):  # its ranks are dead then, which the watch tells
                    await self._parts.weight_sync.update(self._issued)

    # Evaluation and checkpoints

    async def _periodic(self) -> None:
        """What is due at this step and not there yet; some of it may be, after a fall."""
        config, step = self._config, self.step
        last = step == config.run.num_steps
        if self.evaluations.newest_step < step and (last or step == 0 or _due(step, config.evaluation.every_steps)):
            try:
                await unless(self._told_to_stop, self._watch.during(self._evaluate()))
            except Overtaken:
                await self._end_early()
            except QuatroError:
                await self._keeper.keep(is_early=True)
                raise
        if self._keeper.saved == step or last or _due(step, config.checkpoint.every_steps):
            await self._keeper.keep()

    async def _evaluation_loop(self) -> None:
        try:
            await self.evaluations.loop()
        except QuatroError:
            await self._keeper.keep(is_early=True)
            raise

    async def _finish_evaluations(self) -> None:
        try:
            await unless(self._told_to_stop, self.evaluations.finish())
        except Overtaken:
            await self._end_early()

    async def _evaluate(self) -> None:
        """With engines of their own, only the export keeps the learner; else it waits, and the weights stay as they
        are, while generation for training goes on."""
        if self._parts.evaluator is None:
            sampler = Sampler(
                self._parts.generators, self._parts.verifiers, self._config.generator, self._recorder.note
            )
            results = []
            for name, queries in self._held_out.items():
                with self._recorder.phase("learner", "evaluate"):
                    results.append(await evaluate_set(self._config, sampler, name, queries, self.version, self.step))
            return self.evaluations.add(results)
        with self._recorder.phase("learner", "export"):
            await self.evaluations.room()
            try:
                await self._keeper.export(self.evaluations.path(self.version))
            except CheckpointError as error:
                return self._recorder.event("failed", "evaluation", step=self.step, why=f"left out: {error}")
        self.evaluations.exported(self.version, self.step)


async def _cancelled(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _timing(update: Update) -> dict[str, float]:
    return {
        "time/weight_sync_pause_s": update.pause_s,
        "time/weight_sync_transfer_s": update.transfer_s,
        "weight_sync/groups_in_flight": update.num_in_flight,
    }


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
