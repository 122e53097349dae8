"""The loops of a run. Each docstring says what the loop consumes, what it waits for, and what unblocks it.

The controller drives small interfaces (actors/interfaces.py): on a cluster they are actors, in tests plain objects.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import cast

from quatro_ray.actors.interfaces import LeasedRef
from quatro_ray.config import Config
from quatro_ray.data.dataset import QueryStream
from quatro_ray.errors import CheckpointError, Preempted, QuatroError, StallError
from quatro_ray.evaluation.evaluator import evaluate_set
from quatro_ray.evaluation.sampler import Sampler
from quatro_ray.failures import LearnerLost
from quatro_ray.orchestrator.admission import Admission
from quatro_ray.orchestrator.background_evaluation import BackgroundEvaluation
from quatro_ray.orchestrator.checkpoint_writer import CheckpointWriter, RunState
from quatro_ray.orchestrator.components import Components
from quatro_ray.orchestrator.drain_monitor import DrainMonitor
from quatro_ray.orchestrator.group_runner import GroupRunner
from quatro_ray.orchestrator.learner_monitor import LearnerMonitor
from quatro_ray.orchestrator.position import Position
from quatro_ray.orchestrator.recovery import Recovery
from quatro_ray.orchestrator.stall_report import stall_report
from quatro_ray.replay.buffer import LeaseSummary
from quatro_ray.telemetry.counters import Counters
from quatro_ray.telemetry.recorder import Recorder
from quatro_ray.telemetry.step_clock import StepClock
from quatro_ray.telemetry.step_warnings import StepWarnings
from quatro_ray.timeouts import Overtaken, unless, within
from quatro_ray.types import Query
from quatro_ray.weight_sync.coordinator import Update


class Controller:
    """Generates, trains, evaluates and writes checkpoints until the last step is done.

    Args:
        queries: queries to train on, from all sources.
        held_out: queries to evaluate on, by data source.
    """

    def __init__(
        self,
        config: Config,
        components: Components,
        queries: QueryStream,
        held_out: Mapping[str, Sequence[Query]],
        recorder: Recorder,
    ) -> None:
        self._config = config
        self._components = components
        self._held_out = held_out
        self._recorder = recorder
        self.counters = counters = Counters()
        recorder.watch("generators", components.generators.activity)
        recorder.watch("verifiers", components.verifiers.activity)
        self._clock = StepClock(recorder.now, recorder.roles)
        self._warnings = StepWarnings(response_weights=_weighs_whole_responses(config))
        self._position = Position()
        self._learner_lock = asyncio.Lock()
        # set if a group is ready, the learner is lost, or the run is to end: the events that end the wait for groups
        self._wake = asyncio.Event()
        self._told_to_stop = asyncio.Event()
        self._monitor = LearnerMonitor(components.learner, config.cluster.liveness_deadline_s, self._wake.set)
        runner = GroupRunner(config, components.generators, components.verifiers, components.replay, recorder, counters)
        self._admission = Admission(components.replay, runner, queries, self._position, self._wake.set)
        folder = config.run.dir / "evaluating"
        self.evaluation = BackgroundEvaluation(components.evaluator, held_out, folder, recorder, counters)
        self._writer = CheckpointWriter(
            config, components.checkpoints, components.replay, components.learner, self._learner_lock, recorder,
            self._run_state,
        )  # fmt: skip
        self._recovery = Recovery(
            config, components, self._position, self._admission, self._monitor, self._writer, self.evaluation,
            counters, recorder,
        )  # fmt: skip

    @property
    def version(self) -> int:
        """The policy version that the engines have."""
        return self._position.version

    @property
    def step(self) -> int:
        """Optimiser steps of the policy that the engines have."""
        return self._position.step

    # Beginning and end

    async def run(self, *, resume: bool = False) -> Counters:
        """Train until `run.num_steps` steps are done.

        Args:
            resume: continue from the newest checkpoint of an earlier run, whose ledger is open.

        Raises:
            QuatroError: with a message for users; names the component that failed.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                background = [tasks.create_task(loop) for loop in (self._join_loop(), self._monitor.loop())]
                background.append(tasks.create_task(self._grace_loop()))
                self._components.generators.started(synced=not resume)
                self._components.generators.supervise(tasks, self._recorder)
                if resume:
                    async with self._learner_lock:
                        await self._recovery.resume()
                background.append(tasks.create_task(self._admission.loop(tasks)))
                if (notice := self._components.drain_notice) is not None:
                    drain = DrainMonitor(notice, self._components.generators, self._writer, self._recorder)
                    background.append(tasks.create_task(drain.loop()))
                if self._components.evaluator is not None:
                    background.append(tasks.create_task(self._evaluation_loop()))
                await self._learn_loop()
                await self._finish_evaluations()
                async with self._learner_lock:  # so that no engine is left in the middle of a weight update
                    self._components.generators.close()
                for task in [*background, *self._admission.tasks()]:
                    task.cancel()
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from group
        await self._components.replay.end_run()
        return self.counters

    def stop(self) -> None:
        """End the run after the current step, with a checkpoint. May be called by a signal handler."""
        self._told_to_stop.set()
        self._wake.set()

    async def _grace_loop(self) -> None:
        """End the run if it was told to stop and did not within `checkpoint.grace_s`."""
        await self._told_to_stop.wait()
        await asyncio.sleep(grace := self._config.checkpoint.grace_s)
        raise Preempted(
            f"told to stop, but no checkpoint finished within checkpoint.grace_s={grace:g} s; rerun with "
            "run.resume=auto to continue from the previous one"
        )

    # Learning

    async def _learn_loop(self) -> None:
        """Consume ready groups, B per step. Waits for B ready groups; unblocked by each group that becomes ready."""
        self._clock.start(self.counters.generated_tokens)
        while True:
            try:
                await self._periodic()
                if self.step == self._config.run.num_steps:
                    return
                with self._recorder.phase("learner", "wait"):
                    summary, leased = await self._lease()
                async with self._learner_lock:
                    self._monitor.check()
                    await self._step(summary, leased)
            except LearnerLost as lost:
                async with self._learner_lock:
                    await self._recovery.restart_learner(str(lost))

    async def _step(self, summary: LeaseSummary, leased: LeasedRef) -> None:
        async with self._components.learner_turn():
            with self._recorder.phase("learner", "train"):
                metrics = await self._components.learner.train_step(leased, self.version)
        self._position.issue(await self._components.replay.commit(self.version))
        with self._recorder.phase("learner", "sync"):
            update = await self._components.weight_sync.update(self._position.issued)
        self._position.move(update.version, self.step + 1)
        self._admission.capacity_changed()
        self._recovery.step_made(self.step)
        self.counters.steps.add(metrics, update.num_in_flight)
        metrics |= self.counters.recent.read() | summary.metrics | _timing(update) | self._health()
        metrics |= self._clock.step(
            num_trained=cast(int, metrics["tokens/trained"]),
            num_rollouts=cast(int, metrics["rollout/num"]),
            num_generated=self.counters.generated_tokens,
        )
        self._recorder.step(self.step, metrics, summary.samples)
        for warning in self._warnings.add(metrics):
            self._recorder.say(f"step {self.step}: {warning}", level=logging.WARNING)

    def _health(self) -> dict[str, float]:
        return self.counters.health() | {
            "health/verifiers_replaced": float(self._components.verifiers.num_replaced),
            "health/engines": float(self._components.generators.num_healthy()),
            "health/engines_lost": float(self._components.generators.num_lost),
        }

    async def _lease(self) -> tuple[LeaseSummary, LeasedRef]:
        """Wait for a batch.

        Raises:
            LearnerLost: the learner died meanwhile.
            StallError: no group became ready within `cluster.stall_deadline_s`.
            Preempted: the run was told to stop.
        """
        deadline = self._config.cluster.stall_deadline_s
        while True:
            self._wake.clear()
            self._monitor.check()
            if self._told_to_stop.is_set():
                await self._end_early()
            samples = self._config.telemetry.rollout_groups_per_step
            summary, leased = await self._components.replay.lease(self.version, samples)
            self._admission.capacity_changed()  # expired groups have made room
            if summary is not None:
                return summary, leased
            try:
                await within(deadline, self._wake.wait())
            except TimeoutError as error:
                report = await stall_report(self._components, self._config.run.dir, self.version)
                raise StallError(f"no group became ready for {deadline:g} s. {report}") from error

    async def _end_early(self) -> None:
        """Write a checkpoint and raise Preempted."""
        await self._writer.write(is_early=True)
        saved = "a checkpoint is written" if self._writer.saved_step == self.step else "no checkpoint could be written"
        if self.step == 0:
            saved = "there is nothing to save yet"
        raise Preempted(
            f"told to stop after step {self.step} of {self._config.run.num_steps}; {saved}; rerun with run.resume=auto "
            "to continue"
        )

    def _run_state(self) -> RunState:
        saved = {"tally": self.counters.to_dict(), "to_evaluate": self.evaluation.pending()}
        return RunState(self.step, self.version, saved)

    async def _join_loop(self) -> None:
        """Consume restarted engines. Waits for one and for the learner's lock; then sends the current weights."""
        joining = self._components.generators.joining
        while True:
            await joining.wait()
            joining.clear()
            async with self._learner_lock:
                if not self._components.generators.is_any_waiting():
                    continue  # a step's own update was faster
                # the monitor reports the death of the learner's ranks
                with suppress(LearnerLost), self._recorder.phase("learner", "sync"):
                    await self._components.weight_sync.update(self._position.issued)

    # Evaluation and checkpoints

    async def _periodic(self) -> None:
        """Evaluate and write a checkpoint if due at this step; after a fall-back, either may be done already."""
        config, step = self._config, self.step
        last = step == config.run.num_steps
        if self.evaluation.newest_step < step and (last or step == 0 or _due(step, config.evaluation.every_steps)):
            try:
                await unless(self._told_to_stop, self._monitor.during(self._evaluate()))
            except Overtaken:
                await self._end_early()
            except QuatroError:
                await self._writer.write(is_early=True)
                raise
        is_kept = step + 1 in config.replay.keep_steps
        if self._writer.saved_step == step or last or is_kept or _due(step, config.checkpoint.every_steps):
            await self._writer.write()

    async def _evaluation_loop(self) -> None:
        """Consume exported policies; see BackgroundEvaluation.loop. Saves the run if an evaluation fails."""
        try:
            await self.evaluation.loop()
        except QuatroError:
            await self._writer.write(is_early=True)
            raise

    async def _finish_evaluations(self) -> None:
        try:
            await unless(self._told_to_stop, self.evaluation.finish())
        except Overtaken:
            await self._end_early()

    async def _evaluate(self) -> None:
        """Evaluate the current policy.

        With dedicated evaluation engines the learner blocks only for the export. Otherwise it waits and the weights
        are frozen; rollout generation continues.
        """
        if self._components.evaluator is None:
            await self._evaluate_here()
        else:
            await self._export_for_evaluation()

    async def _evaluate_here(self) -> None:
        generators, verifiers = self._components.generators.for_evaluation(), self._components.verifiers
        sampler = Sampler(generators, verifiers, self._config.generator, self._recorder.note)
        results = []
        for name, queries in self._held_out.items():
            with self._recorder.phase("learner", "evaluate"):
                results.append(await evaluate_set(self._config, sampler, name, queries, self.version, self.step))
        self.evaluation.add(results)

    async def _export_for_evaluation(self) -> None:
        with self._recorder.phase("learner", "export"):
            await self.evaluation.wait_for_capacity()
            try:
                await self._writer.export(self.evaluation.path(self.version))
            except CheckpointError as error:
                return self._recorder.event("failed", "evaluation", step=self.step, why=f"left out: {error}")
        self.evaluation.exported(self.version, self.step)


def _timing(update: Update) -> dict[str, float]:
    figures: dict[str, float] = {
        "time/weight_sync_pause_s": update.pause_s,
        "time/weight_sync_transfer_s": update.transfer_s,
        "weight_sync/groups_in_flight": update.num_in_flight,
    }
    if update.logprob_abs_diff is not None:
        figures["weight_sync/logprob_abs_diff"] = update.logprob_abs_diff
    return figures


def _weighs_whole_responses(config: Config) -> bool:
    """Tell if the objective's importance weights are products over whole responses."""
    weights = getattr(config.objective, "importance", config.objective)
    return getattr(weights, "level", None) == "sequence"


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
