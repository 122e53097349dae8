"""An update keeps its deadlines, checks the version, and gives work only to engines that hold all of it."""

import asyncio
from typing import Any

import numpy as np
import pytest

from quatro_ray.config import WeightSyncConfig
from quatro_ray.errors import WeightSyncError
from quatro_ray.failures import LearnerLost, TransferFailed
from quatro_ray.types import Installed
from quatro_ray.weight_sync.agreement import AgreementCheck, Scored, fixed_sequences
from quatro_ray.weight_sync.coordinator import Update, WeightSyncCoordinator


class Engine:
    def __init__(self, running: int = 2, stuck_in: str = "") -> None:
        self.running, self.stuck_in = running, stuck_in
        self.version, self.paused, self.calls = 0, False, []  # type: ignore[var-annotated]
        self.receiving: bool = False
        self.received: int | None = None
        """The version that arrived and is not installed."""
        self.off_by: list[float] = []
        """By how many nats each of the next scores is wrong."""
        self.sampling_off_by = 0.0
        self.checksums: list[int] = []
        """Of the next comparisons; that of the learner is 0."""

    async def _maybe_hang(self, name: str) -> None:
        self.calls.append(name)
        if name == self.stuck_in:
            await asyncio.sleep(3600)

    async def pause(self) -> int:
        await self._maybe_hang("pause")
        self.paused = True
        return self.running

    async def resume(self) -> None:
        await self._maybe_hang("resume")
        self.paused = False

    async def receive_weights(self) -> None:
        await self._maybe_hang("receive_weights")
        self.receiving = True

    async def install_weights(self, version: int) -> Installed:
        await self._maybe_hang("install_weights")
        assert self.received is not None
        self.version, self.received = self.received, None
        return Installed(self.version, self.running, pause_s=self.running / 100)

    async def policy_version(self) -> int:
        await self._maybe_hang("policy_version")
        return self.version

    async def score(self, sequences: list[list[int]]) -> list[list[float]]:
        await self._maybe_hang("score")
        off = self.off_by.pop(0) if self.off_by else 0.0
        return [[-1.0 + off] * (len(ids) - 1) for ids in sequences]

    async def sampling_error(self, sequences: list[list[int]]) -> float:
        await self._maybe_hang("sampling_error")
        return self.sampling_off_by

    async def parameter_checksums(self) -> list[dict[str, str]]:
        await self._maybe_hang("parameter_checksums")
        return [{"norm": f"float32 3 {self.checksums.pop(0) if self.checksums else 0}"}]


class EngineSlot:
    def __init__(self, client: Engine, index: int = 0) -> None:
        self.client, self.index, self.is_updating = client, index, False

    def update_begins(self) -> None:
        self.is_updating = True

    def update_ends(self) -> None:
        self.is_updating = False


class Fleet:
    """Slots leave when they are lost, and none comes back."""

    def __init__(self, *engines: Engine) -> None:
        self.slots = [EngineSlot(e, i) for i, e in enumerate(engines)]
        self.holding: list[EngineSlot] = []
        self.whys: list[str] = []
        self.successors: dict[int, Engine] = {}
        """The engine that takes the place of a lost one, by index."""

    async def some_to_sync(self) -> list[EngineSlot]:
        while not self.slots:
            await asyncio.sleep(0.01)
        return list(self.slots)

    async def synced(self, slot: EngineSlot) -> None:
        self.holding.append(slot)

    def lost(self, slot: EngineSlot, why: str, *, core_died: bool = False) -> None:
        if slot in self.slots:
            self.slots.remove(slot)
            self.whys.append(why)
            if (successor := self.successors.pop(slot.index, None)) is not None:
                self.slots.append(EngineSlot(successor, slot.index))


class Sender:
    def __init__(self, **failures: Any) -> None:
        self.failures = failures
        self.connections: list[list[Engine]] = []
        self.offset = 0
        self.during_send: Any = None
        """Called with the engines while the weights are under way."""

    async def open_transfer(self, engines: Any) -> None:
        self.connections.append(list(engines))
        if error := self.failures.pop("open", None):
            raise error

    async def send_weights(self, version: int) -> None:
        engines = self.connections[-1]
        assert all(e.receiving != e.paused for e in engines)
        if self.during_send is not None:
            self.during_send(engines)
        if error := self.failures.pop("send", None):
            raise error
        for engine in engines:
            if engine.receiving:
                engine.received, engine.receiving = version + self.offset, False
            else:
                engine.version = version + self.offset


CONFIG = WeightSyncConfig(pause_deadline_s=0.1, transfer_deadline_s=0.1, resume_deadline_s=0.1)


PAUSED = ["pause", "resume", "policy_version"]
"""The calls of an update during which engines are paused."""
GENERATING = ["receive_weights", "install_weights"]
"""The calls of one whose transfer engines generate during."""
both_kinds = pytest.mark.parametrize("generates", [True, False], ids=["generating", "paused"])


def update(fleet: Fleet, sender: Sender, *versions: int, generates: bool = True) -> list[Update]:
    async def run() -> list[Update]:
        sync = WeightSyncCoordinator(fleet, sender, CONFIG, engine_deadline_s=0.3, generates_during_transfer=generates)
        return [await sync.update(v) for v in versions]

    return asyncio.run(run())


@both_kinds
def test_a_whole_update(generates: bool) -> None:
    fleet, sender = Fleet(Engine(2), Engine(3)), Sender()
    first, second = update(fleet, sender, 4, 5, generates=generates)
    assert (first.version, first.num_in_flight, second.version) == (4, 5, 5)
    assert len(sender.connections) == 1  # the same engines need no new connection
    assert all(m.client.calls == (GENERATING if generates else PAUSED) * 2 for m in fleet.slots)
    assert len(fleet.holding) == 4 and not any(m.is_updating for m in fleet.slots)


def test_engines_count_as_paused_only_while_they_are() -> None:
    fleet, sender = Fleet(Engine(2), Engine(3)), Sender()
    sender.during_send = lambda _: updating.append([slot.is_updating for slot in fleet.slots])
    updating: list[list[bool]] = []
    (done,) = update(fleet, sender, 1, generates=True)
    update(fleet, sender, 2, generates=False)
    assert updating == [[False, False], [True, True]]
    assert done.pause_s == 0.03  # as the slower engine reports


@pytest.mark.parametrize(("phase", "generates"), [(p, True) for p in GENERATING] + [(p, False) for p in PAUSED])
def test_an_engine_that_misses_a_phase_is_taken_out_and_the_others_go_on(phase: str, generates: bool) -> None:
    fleet, sender = Fleet(Engine(2, stuck_in=phase), Engine(3)), Sender()
    (done,) = update(fleet, sender, 1, generates=generates)
    assert fleet.whys == [f"weight sync: '{phase}' missed its deadline of 0.1 s"]
    assert done.num_in_flight == 3 and [m.client.running for m in fleet.holding] == [3]


def test_an_engine_that_does_not_receive_holds_up_no_transfer() -> None:
    """The others receive again over a new connection: over the old one they would wait for what it sends next."""
    fleet, sender = Fleet(Engine(stuck_in="receive_weights"), other := Engine()), Sender()
    sent_to: list[int] = []
    sender.during_send = lambda engines: sent_to.append(len(engines))
    update(fleet, sender, 1)
    assert sent_to == [1] and [len(c) for c in sender.connections] == [2, 1]
    assert other.calls == ["receive_weights", *GENERATING]


def test_an_update_that_is_cancelled_while_engines_begin_to_receive_leaves_no_connection() -> None:
    async def run() -> None:
        sync = WeightSyncCoordinator(fleet, sender, CONFIG, engine_deadline_s=0.3, generates_during_transfer=True)
        cancelled = asyncio.ensure_future(sync.update(1))
        while not engine.calls:
            await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)
        engine.stuck_in = ""
        await sync.update(1)

    engine = Engine(stuck_in="receive_weights")
    fleet, sender = Fleet(engine), Sender()
    asyncio.run(run())
    assert len(sender.connections) == 2 and not fleet.whys


@both_kinds
def test_after_a_failed_transfer_no_engine_of_it_is_trusted(generates: bool) -> None:
    """It may hold a part of the new weights."""
    fleet, sender = Fleet(Engine(), Engine()), Sender(send=TransferFailed("broken pipe"))
    with pytest.raises(WeightSyncError, match=r"no engine ran within 0\.3 s; the last failure: broken pipe"):
        update(fleet, sender, 7, generates=generates)
    assert len(fleet.whys) == 2 and not fleet.holding
    assert all("in doubt, the update to version 7 failed: broken pipe" in why for why in fleet.whys)


@both_kinds
def test_a_learner_that_dies_is_told_apart_and_leaves_engines_in_doubt(generates: bool) -> None:
    fleet = Fleet(Engine())
    with pytest.raises(LearnerLost, match="a rank died"):
        update(fleet, Sender(send=LearnerLost("a rank died")), 1, generates=generates)
    assert "in doubt" in fleet.whys[0]


@both_kinds
def test_a_connection_that_fails_blames_who_does_not_answer(generates: bool) -> None:
    fleet, sender = Fleet(Engine(stuck_in="policy_version"), Engine()), Sender(open=TransferFailed("timed out"))
    (done,) = update(fleet, sender, 1, generates=generates)
    assert done.version == 1
    assert fleet.whys == ["weight sync: 'policy_version' missed its deadline of 0.1 s"]
    assert [len(c) for c in sender.connections] == [2, 1]


@both_kinds
def test_a_connection_that_nobody_can_be_blamed_for_starts_all_again(generates: bool) -> None:
    fleet = Fleet(Engine(), Engine())
    with pytest.raises(WeightSyncError, match="no engine ran"):
        update(fleet, Sender(open=TransferFailed("timed out")), 1, generates=generates)
    assert fleet.whys == ["could not be connected to the learner"] * 2


@both_kinds
def test_a_version_that_did_not_arrive_takes_the_engine_out(generates: bool) -> None:
    fleet, sender = Fleet(Engine()), Sender()
    sender.offset = -1
    with pytest.raises(WeightSyncError, match="no engine ran"):
        update(fleet, sender, 5, generates=generates)
    assert fleet.whys == ["reports version 4 after an update to version 5"] and not fleet.holding


class Scorer:
    def __init__(self) -> None:
        self.num_calls = 0

    async def score_fixed(self, max_tokens: int) -> list[Scored]:
        self.num_calls += 1
        return [Scored(ids, np.full(len(ids) - 1, -1.0, np.float32)) for ids in fixed_sequences(50, max_tokens)]

    async def parameter_checksums(self, dtypes: dict[str, str]) -> dict[str, str]:
        assert dtypes == {"norm": "float32"}
        return {"norm": "float32 3 0", "fused": "float32 3 1"}


def checked(fleet: Fleet, *versions: int, every: int = 1, max_tokens: int = 30) -> tuple[list[Update], int]:
    """Return the updates, and how often the learner scored."""
    scorer = Scorer()
    agreement = AgreementCheck(scorer, max_tokens, max_nats=0.01, every_updates=every, deadline_s=0.1)

    async def run() -> list[Update]:
        sync = WeightSyncCoordinator(fleet, Sender(), CONFIG, 0.3, generates_during_transfer=True, agreement=agreement)
        return [await sync.update(v) for v in versions]

    return asyncio.run(run()), scorer.num_calls


def engine_off_by(*nats: float) -> Engine:
    engine = Engine()
    engine.off_by = list(nats)
    return engine


def test_the_first_update_and_every_nth_are_checked() -> None:
    fleet = Fleet(engine_off_by(0.001), engine_off_by(0.003))
    updates, num_calls = checked(fleet, *range(1, 8), every=3)
    assert num_calls == 3
    assert [u.logprob_abs_diff is not None for u in updates] == [True, False, False, True, False, False, True]
    assert updates[0].logprob_abs_diff == pytest.approx(0.003, abs=1e-6)
    assert not fleet.whys


def test_an_engine_that_differs_gets_the_weights_again() -> None:
    engine, other = engine_off_by(3.0, 0.0), Engine()
    fleet = Fleet(engine, other)
    (update,), num_calls = checked(fleet, 1)
    assert num_calls == 2 and not fleet.whys
    assert engine.calls.count("install_weights") == other.calls.count("install_weights") == 2
    assert update.logprob_abs_diff == pytest.approx(0, abs=1e-6)
    assert {slot.client for slot in fleet.holding} == {engine, other}


def test_one_that_still_differs_is_restarted_and_the_others_go_on() -> None:
    fleet = Fleet(engine_off_by(3.0, 3.0), Engine())
    (update,), _ = checked(fleet, 1)
    assert [slot.index for slot in fleet.holding] == [1]
    (why,) = fleet.whys
    assert "differs from the learner by 3 nats, and what it samples" in why
    assert "by 0 nats, under version 1; at most 0.01 nats are rounding, also after it" in why
    assert update.version == 1


def test_one_that_differs_after_its_restart_ends_the_run_with_the_reason() -> None:
    fleet = Fleet(engine_off_by(3.0, 3.0))
    fleet.successors[0] = engine_off_by(2.5)
    with pytest.raises(WeightSyncError, match=r"generator 0 differs from the learner by 2\.5 nats.* after a restart"):
        checked(fleet, 1)
    assert not fleet.holding


def test_a_restart_that_helps_is_forgotten() -> None:
    fleet = Fleet(engine_off_by(3.0, 3.0))
    fleet.successors[0] = engine_off_by(0.0, 3.0)
    updates, _ = checked(fleet, 1, 2)  # in the second, the weights once more are enough
    assert len(updates) == 2 and len(fleet.whys) == 1


def test_log_probs_that_are_not_numbers_are_a_difference() -> None:
    fleet = Fleet(engine_off_by(float("nan"), float("nan")), Engine())
    checked(fleet, 1)
    assert "differs from the learner by nan nats" in fleet.whys[0]


@pytest.mark.parametrize("nats", [0.02, float("nan")])
def test_sampled_log_probs_that_are_not_the_scores_are_a_difference(nats: float) -> None:
    engine = Engine()
    engine.sampling_off_by = nats
    fleet = Fleet(engine, Engine())
    checked(fleet, 1)
    assert [slot.index for slot in fleet.holding] == [1]
    assert f"what it samples from its own scores by {nats:.3g} nats" in fleet.whys[0]


def test_one_with_other_bits_gets_the_weights_again_then_is_restarted() -> None:
    engine, other = Engine(), Engine()
    engine.checksums = [0, 7, 0, 7, 7]
    fleet = Fleet(engine, other)
    checked(fleet, 1, 2)
    assert not fleet.whys and other.calls.count("install_weights") == 3  # the second update took two tries
    checked(fleet, 3)
    (why,) = fleet.whys
    assert why == "holds other weights than the learner in norm under version 3, also after it got the weights again"


@pytest.mark.parametrize("method", ["score", "sampling_error", "parameter_checksums"])
def test_an_engine_that_does_not_score_in_time_is_lost(method: str) -> None:
    fleet = Fleet(Engine(stuck_in=method), Engine())
    checked(fleet, 1)
    assert fleet.whys == [f"weight sync: {method!r} missed its deadline of 0.1 s"]


def test_engines_that_take_no_second_token_are_not_checked() -> None:
    (update,), _ = checked(Fleet(Engine()), 1, max_tokens=1)
    assert update.logprob_abs_diff is None
