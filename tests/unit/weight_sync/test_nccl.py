"""A transfer over NCCL ends within its deadline, whatever its engines do, and the next one works."""

from __future__ import annotations

import asyncio
import socket
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch

from quatro_ray.actors.learner_group import LearnerGroup
from quatro_ray.config import WeightSyncConfig
from quatro_ray.failures import LearnerLost, TransferFailed
from quatro_ray.weight_sync import nccl as module
from quatro_ray.weight_sync.sender import WeightSender
from tests.make import config
from tests.unit.weight_sync.nccl_fakes import (
    PATIENCE_S,
    Communicator,
    Fault,
    Gather,
    Nccl,
    Policy,
    Rank,
    collect,
    make_engine,
    nccl,
    submit,
)

__all__ = ["nccl"]
pytestmark = pytest.mark.filterwarnings("ignore:Tensor .* exceeds buffer_size_bytes")
NUM_LAYERS = 4
DIED = "failed: the engine died$"
LATE = "deadline of|within"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class Rig:
    """Two learner ranks and two engines. Each layer fills a buffer, so it has a broadcast of its own."""

    def __init__(self, nccl: Nccl) -> None:
        self.nccl = nccl
        self.policy, self.gather = Policy(), Gather()
        senders = [WeightSender(r, self.gather.source(r, self.policy), submit, collect) for r in (0, 1)]
        self.ranks = [Rank(sender, ("127.0.0.1", free_port)) for sender in senders]
        self.engines: list[Any] = [make_engine(nccl), make_engine(nccl)]

    def _group(self, **deadlines: float) -> LearnerGroup:
        patient = {"rendezvous_deadline_s": PATIENCE_S, "transfer_deadline_s": PATIENCE_S}
        sync = WeightSyncConfig.model_validate(patient | deadlines | {"buffer_mib": 1})
        return LearnerGroup(lambda: self.ranks, config().learner, sync, "nccl", 1)

    def connect(self, **deadlines: float) -> None:
        clients = [SimpleNamespace(actor=engine) for engine in self.engines]
        asyncio.run(self._group(**deadlines).open_transfer(clients))

    def send(self, version: int, **deadlines: float) -> None:
        asyncio.run(self._group(**deadlines).send_weights(version))

    def restart_engines(self) -> None:
        killed = [engine.llm.worker.model_update_group for engine in self.engines]
        self.nccl.made = [c for c in self.nccl.made if c not in killed]
        self.engines = [make_engine(self.nccl), make_engine(self.nccl)]

    def assert_update_works(self, version: int) -> None:
        with torch.no_grad():
            for parameter in self.policy.parameters():
                parameter.add_(1.0)
        self.send(version)
        for engine in self.engines:
            assert engine.llm.version == str(version)
            torch.testing.assert_close(engine.llm.model.loaded, dict(self.policy.named_parameters()), rtol=0, atol=0)

    def assert_next_update_works(self) -> None:
        self.restart_engines()
        self.connect()
        self.assert_update_works(7)
        self.assert_nothing_leaks()

    def assert_nothing_leaks(self) -> None:
        assert len(self.nccl.living(sender=True)) == 1
        assert len(self.nccl.living(sender=False)) == len(self.engines)
        assert all(c.num_destroyed <= 1 for c in self.nccl.made)


both_ways = pytest.mark.parametrize("dies", [True, False], ids=["dies", "hangs"])


@both_ways
@pytest.mark.parametrize("phase", ["store", "join"])
def test_an_engine_fails_at_the_rendezvous(nccl: Nccl, phase: str, dies: bool) -> None:
    rig = Rig(nccl)
    nccl.fault = Fault(phase, dies)
    with pytest.raises(TransferFailed, match=DIED if dies else LATE):
        rig.connect(**({} if dies else {"rendezvous_deadline_s": 2.0}))
    rig.assert_next_update_works()


@both_ways
@pytest.mark.parametrize("phase", [0, 1, NUM_LAYERS - 1], ids=["first", "half-way", "last"])
def test_an_engine_fails_while_it_receives(nccl: Nccl, phase: int, dies: bool) -> None:
    rig = Rig(nccl)
    deadline = {} if dies else {"transfer_deadline_s": 1.0}
    rig.connect(**deadline)
    nccl.fault = Fault(phase, dies)
    with pytest.raises(TransferFailed, match=DIED if dies else LATE):
        rig.send(1, **deadline)
    assert rig.gather.num_layers == [NUM_LAYERS] * 2  # both ranks took part in the whole pass
    assert [c.num_destroyed for c in nccl.made if c.rank == 0] == [1]
    rig.assert_next_update_works()


def test_a_deadline_of_the_controller_frees_the_learner_too(nccl: Nccl) -> None:
    rig = Rig(nccl)
    rig.connect()
    nccl.fault = Fault(0, dies=False)
    with pytest.raises(TransferFailed, match=r"send_weights missed its deadline of 1 s"):
        # the deadline of the rank's own calls is longer than both
        rig.send(1, transfer_deadline_s=1.0, rendezvous_deadline_s=PATIENCE_S / 2)
    rig.assert_next_update_works()


def test_reconnections_leave_one_communicator_on_each_side(nccl: Nccl) -> None:
    rig = Rig(nccl)
    for version in range(5):
        rig.connect()
        rig.assert_update_works(version)
        rig.assert_nothing_leaks()
    assert len(nccl.made) == 15


def test_a_learner_that_an_abort_does_not_free_is_lost(nccl: Nccl, monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[Any] = []
    monkeypatch.setattr(ray, "kill", killed.append)
    monkeypatch.setattr(module, "_ENQUEUE_S", 0.1)
    monkeypatch.setattr(Communicator, "_send", lambda self, tensor: self.nccl.wait_until(lambda: False))
    rig = Rig(nccl)
    rig.connect()
    with pytest.raises(LearnerLost, match=r"send_weights, which was aborted .* missed its deadline of 1 s"):
        rig.send(1, transfer_deadline_s=1.0, rendezvous_deadline_s=1.0)
    assert killed == rig.ranks


def test_both_ends_use_the_buffers_of_the_configuration(nccl: Nccl) -> None:
    rig = Rig(nccl)
    rig.connect()
    sizes = {engine.llm.worker.packed_buffer_size_bytes for engine in rig.engines}
    assert sizes == {1 << 20} and all(engine.llm.worker.packed for engine in rig.engines)
    assert {engine.llm.worker.packed_num_buffers for engine in rig.engines} == {2}
    rig.send(1)
    (communicator,) = nccl.living(sender=True)
    assert len(communicator.sent) == NUM_LAYERS  # with the default of 1 GiB it would be one broadcast
