"""A ring of fakes on a virtual clock: real fleet, weight sync, buffer, checkpoints and controller, no processes."""

from __future__ import annotations

import asyncio
import json
import random
import sqlite3
from collections import Counter
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from quatro_ray.actors.device_turns import DeviceTurns
from quatro_ray.actors.fleet import Fleet
from quatro_ray.config import Config
from quatro_ray.data.dataset import Dataset, QueryStream
from quatro_ray.engines.checkpoint_store import checkpoint_store, digest_files
from quatro_ray.errors import ClusterError
from quatro_ray.failures import LearnerLost, TransferFailed, VerifierFailed
from quatro_ray.orchestrator.components import Components
from quatro_ray.orchestrator.controller import Controller
from quatro_ray.replay.buffer import ReplayBuffer
from quatro_ray.simulation.virtual_loop import VirtualLoop
from quatro_ray.telemetry.activity import Activity
from quatro_ray.telemetry.console import Progress
from quatro_ray.telemetry.counters import Counters
from quatro_ray.telemetry.evaluation_result import EvaluationResult
from quatro_ray.telemetry.recorder import Recorder
from quatro_ray.types import (
    DropReason,
    GroupSummary,
    Query,
    RolloutGroup,
    Score,
)
from quatro_ray.weight_sync.coordinator import WeightSyncCoordinator
from tests.make import config
from tests.unit.fake_generator import FakeGenerator


class FakeVerifiers:
    def __init__(self, failing: AbstractSet[int] = frozenset()) -> None:
        self.failing = failing
        self.truncated: set[int] = set()
        self.num_replaced = 0
        self.activity = Activity()
        self.reward = 1.0
        self.fails = False
        """Evaluations, whose groups have numbers below 0."""

    async def score(self, group: object) -> tuple[GroupSummary, Any]:
        """The reference is the group itself, which nobody awaits here."""
        assert isinstance(group, RolloutGroup)
        await asyncio.sleep(0)
        if self.fails and group.group_id < 0:
            raise VerifierFailed(DropReason.VERIFIER_TIMEOUT, "lost")
        if group.group_id in self.failing:
            raise VerifierFailed(DropReason.VERIFIER_TIMEOUT, "lost")
        n = len(group.rollouts)
        summary = GroupSummary(
            rewards=(self.reward,) * n,
            reward_values=({"answer": self.reward},) * n,
            outcomes={"ok": n},
            answers=("2",) * n,
            correct=(True,) * n,
            truncated=n if group.group_id in self.truncated else 0,
            turns=(1,) * n,
            response_tokens=(3,) * n,
        )
        score = Score(self.reward, reward_values={"answer": self.reward})
        reason = "length" if summary.truncated else "stop"
        scored = tuple(replace(r, score=score, finish_reason=reason) for r in group.rollouts)
        return summary, replace(group, rollouts=scored)


class Replay:
    """The real buffer behind the async interface of ReplayClient."""

    def __init__(self, buffer: ReplayBuffer) -> None:
        self.buffer = buffer
        self.repeat_every = 0
        self._calls = 0

    def __getattr__(self, name: str) -> Any:
        async def call(*args: Any) -> Any:
            """Now and then once more, as Ray does where the actor died before its answer arrived."""
            self._calls += 1
            result = getattr(self.buffer, name)(*args)
            if self.repeat_every and self._calls % self.repeat_every == 0:
                return getattr(self.buffer, name)(*args)
            return result

        return call


class FakeLearner:
    """Its weights are the number of steps that made them, as text in a file of the checkpoint."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.version, self.weights = 0, 0
        self.lost: str | None = None
        self.uninformative = False
        self.leased: list[int] = []
        self.saved: list[str] = []
        self.exported: list[int] = []
        """Steps."""
        self.engines: list[FakeGenerator] = []

    async def _alive(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        if self.lost is not None:
            raise LearnerLost(self.lost)

    async def train_step(self, leased: Any, version: int) -> dict[str, Any]:
        assert version == self.version
        await self._alive(0.2)
        groups, line = leased.groups, leased.lineage
        assert line.version == version and line.step == self.weights
        self.version, self.weights = version + 1, self.weights + 1
        self.leased += [g.group_id for g in groups]
        ages = Counter(int(s) for g in groups for r in g.rollouts for s in line.staleness(r.versions()))
        return {
            "step/skipped": 0.0,
            "step/uninformative": float(self.uninformative),
            "tokens/trained": sum(ages.values()),
            "off_policy/staleness_tokens": dict(ages),
            "off_policy/staleness_mean": 0.0,
            "off_policy/staleness_max": max(ages),
            "policy/realised_kl_nats": [0.0],
            "policy/entropy": 1.0,
            "reward/mean": 1.0,
        }

    async def open_transfer(self, engines: Sequence[Any]) -> None:
        await self._alive(0.1)
        self.engines = list(engines)

    async def send_weights(self, version: int) -> None:
        assert version == self.version
        await self._alive(0.1)
        if self.world.send_error is not None:
            raise self.world.send_error
        for engine in self.engines:
            if engine.died is not None or engine.hung:
                raise TransferFailed(f"an engine is gone: {engine.died}")
            if self.world.generates_during_transfer:
                engine.received = version
            else:
                engine.version = version

    async def save_checkpoint(self, folder: Path, deadline_s: float) -> Any:
        await self._alive(0.3)
        (folder / "weights").write_text(str(self.weights))
        self.saved.append(folder.name.removesuffix(".writing"))
        return digest_files(folder)

    async def load_checkpoint(self, folder: Path, version: int) -> None:
        await self._alive(0.3)
        self.weights, self.version = int((folder / "weights").read_text()), version

    async def set_version(self, version: int) -> None:
        await self._alive(0.1)
        self.weights, self.version = 0, version

    async def restart(self) -> None:
        self.lost = None
        await self._alive(8.0)

    async def export(self, path: Path, deadline_s: float) -> None:
        await self._alive(0.1)
        path.mkdir(parents=True, exist_ok=True)
        if path.name == "export.writing":
            self.exported.append(self.weights)

    async def watch(self, deadline_s: float) -> str:
        while self.lost is None:
            await asyncio.sleep(1.0)
        return self.lost

    async def stacks(self) -> list[str]:
        return ["learning"]


class FakeEvaluator:
    """`seen`: version and step of each evaluation, and how many steps were done when it began and when it ended."""

    def __init__(self, learner: FakeLearner, seconds: float) -> None:
        self.learner, self.seconds = learner, seconds
        self.fails = False
        self.seen: list[tuple[int, int, int, int]] = []

    async def evaluate(self, path: Path, version: int, step: int, held_out: Any, note: Any) -> list[EvaluationResult]:
        assert path.is_dir()
        begun = self.learner.weights
        await asyncio.sleep(self.seconds)
        if self.fails:
            raise ClusterError("an evaluation engine was lost")
        assert path.is_dir()
        self.seen.append((version, step, begun, self.learner.weights))
        return [EvaluationResult("set", version, step, 1, 8, {1: 0.5}, 0.5, {}, 1, 0.5, 0.0, 8)]


class World:
    """One run directory; `run` is one life of the controller in it."""

    def __init__(self, path: Path, *, ledger: Path | str = ":memory:", **sections: Any) -> None:
        defaults: dict[str, Any] = {
            "run": {"num_steps": 12},
            "evaluation": {"rollout_groups": 0},
            "generator": {"num_engines": 2, "max_groups_in_flight": 4, "start_deadline_s": 60},
        }
        for name, values in sections.items():
            defaults[name] = defaults.get(name, {}) | values
        self.config: Config = config(path, **defaults)
        self.rng = random.Random(0)
        self.ledger = ledger
        self.buffer: ReplayBuffer
        self.generators: list[FakeGenerator] = []
        self.make_generator: Any = lambda index: FakeGenerator(self.rng)
        self.learner = FakeLearner(self)
        self.generates_during_transfer = True
        self.send_error: Exception | None = None
        self.verifiers = FakeVerifiers()
        self.evaluator: Any = None
        self.draining: dict[str, list[int]] = {}
        self.room: Any = None
        self.given_back: list[int] = []
        self.repeat_every = 0
        self.faults: Any = None
        self.fleet: Fleet
        self.controller: Controller
        self._open()

    def _open(self) -> None:
        self.buffer = ReplayBuffer(self.config.replay, self.ledger, num_steps=self.config.run.num_steps)

    def _spawn(self, index: int) -> FakeGenerator:
        generator = self.make_generator(index)
        generator.has_started = len(self.generators) < self.config.generator.num_engines
        self.generators.append(generator)
        return generator

    def run(self, *, resume: bool = False, failing: AbstractSet[int] = frozenset()) -> Counters:
        self.verifiers.failing = failing
        path = self.config.run.dir
        path.mkdir(parents=True, exist_ok=True)
        if self.ledger != ":memory:":
            self._open()
        loop = VirtualLoop()
        steps = self.config.run.num_steps
        recorder = Recorder(path, num_steps=steps, progress=Progress(), clock=loop.time)
        try:
            return loop.run_until_complete(self._main(loop, recorder, resume))
        finally:
            recorder.close()
            loop.close()

    async def _main(self, loop: VirtualLoop, recorder: Recorder, resume: bool) -> Counters:
        queries = {"set": [Query(str(i), "p", "a", source="set") for i in range(500)]}
        held_out = {"set": [Query(f"h{i}", "p", "a") for i in range(4)]}
        dataset = Dataset(queries, {"set": 1.0}, held_out, {})
        generator, liveness_s = self.config.generator, self.config.cluster.liveness_deadline_s
        lock = asyncio.Lock() if self.config.alternates else None
        self.fleet = Fleet(
            self._spawn,
            generator,
            liveness_s,
            clock=loop.time,
            room=self.room,
            give_back=self._give_back,
            device_lock=lock,
        )
        turns = DeviceTurns(self.fleet, lock, generator.sleep_deadline_s) if lock else None
        replay = Replay(self.buffer)
        replay.repeat_every = self.repeat_every
        parts = Components(
            generators=self.fleet,
            verifiers=self.verifiers,
            replay=replay,
            learner=self.learner,
            weight_sync=WeightSyncCoordinator(
                self.fleet,
                self.learner,
                self.config.weight_sync,
                180,
                generates_during_transfer=self.generates_during_transfer,
            ),
            checkpoints=checkpoint_store(self.config),
            evaluator=self.evaluator,
            drain_notice=self._drain_notice,
            learner_turn=turns.of_learner if turns else nullcontext,
        )
        stream = QueryStream(dataset, self.config.run.seed)
        self.controller = Controller(self.config, parts, stream, held_out, recorder)
        run = asyncio.ensure_future(self.controller.run(resume=resume))
        faults = asyncio.ensure_future(self.faults(self)) if self.faults else None
        try:
            return await asyncio.wait_for(run, 100_000)
        finally:
            if faults is not None:
                faults.cancel()
                await asyncio.gather(faults, return_exceptions=True)

    async def _give_back(self, index: int) -> None:
        self.given_back.append(index)

    async def _drain_notice(self) -> dict[str, list[int]]:
        return self.draining

    def metrics(self) -> list[dict[str, Any]]:
        return read(self.config.run.dir / "metrics.jsonl")

    def events(self, event: str) -> list[dict[str, Any]]:
        return [e for e in read(self.config.run.dir / "events.jsonl") if e["event"] == event]


async def lose_an_engine(world: World) -> None:
    """A fault of `World.faults`: after three steps an engine is gone."""
    while world.controller.step < 3:
        await asyncio.sleep(0.01)
    world.fleet.lost(world.fleet.slots[1], "its node is gone")


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def audit(world: World) -> None:
    """Every group is trained once on the line that was kept, or dropped with a reason; every step has its B groups."""
    db: sqlite3.Connection = world.buffer.ledger._db
    line = world.buffer.ledger.versions.lineage(world.buffer.ledger.versions.newest())
    assert line.step == world.config.run.num_steps
    rows = db.execute("SELECT group_id, state, reason, learner_version FROM groups ORDER BY group_id").fetchall()
    assert [r[0] for r in rows] == list(range(1, len(rows) + 1))
    assert {r[1] for r in rows} <= {"trained", "dropped"}
    assert all((r[1] == "dropped") == (r[2] is not None) for r in rows)
    per_version = Counter(r[3] for r in rows if r[1] == "trained")
    stepped = [v for s in line.stretches for v in range(s.first, s.last)]
    assert per_version == dict.fromkeys(stepped, world.config.replay.groups_per_step)
    versions = [v for (v,) in db.execute("SELECT version FROM versions ORDER BY rowid")]
    assert versions == sorted(set(versions))
    assert [m["step"] for m in world.metrics()] == list(range(1, world.config.run.num_steps + 1))
