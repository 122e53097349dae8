"""A rank that is stuck in a weight transfer is freed from another thread, or the learner is lost; on real actors."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError

from quatro_ray.actors.base import WATCH, WATCHED, HostMixin
from quatro_ray.actors.learner_group import LearnerGroup
from quatro_ray.config import WeightSyncConfig
from quatro_ray.failures import LearnerLost, TransferFailed
from tests.make import config

PATIENCE_S = 120.0
pytestmark = pytest.mark.usefixtures("local_ray")


@ray.remote(concurrency_groups=WATCHED, num_cpus=0)
class Rank(HostMixin):
    """Its transfer is stuck until it is closed, if that helps."""

    def __init__(self, *, is_freed: bool) -> None:
        self._freed = threading.Event()
        self._is_freed = is_freed
        self._meeting_points: list[tuple[str, int]] = []

    def open_weight_transfer(
        self, backend: str, engines: Any, workers: int, address: str, port: int, sync: Any
    ) -> None:
        self._meeting_points.append((address, port))

    def send_weights(self, version: int) -> None:
        assert self._freed.wait(PATIENCE_S)
        raise ConnectionAbortedError("the NCCL group was aborted")

    def meeting_points(self) -> list[tuple[str, int]]:
        return self._meeting_points

    @ray.method(concurrency_group=WATCH)
    def close_weight_transfer(self, why: str) -> None:
        if self._is_freed:
            self._freed.set()


@ray.remote(num_cpus=0)
class Engine:
    def die(self) -> None:
        os._exit(1)

    def hang(self) -> None:
        threading.Event().wait(PATIENCE_S)


@pytest.fixture
def make_rank() -> Iterator[Callable[..., Any]]:
    made: list[Any] = []

    def make(**options: bool) -> Any:
        made.append(Rank.remote(**options))  # type: ignore[attr-defined]
        return made[-1]

    yield make
    for rank in made:
        ray.kill(rank)


def on_group(rank: Any, work: Callable[[LearnerGroup], Awaitable[None]], **deadlines: float) -> None:
    async def run() -> None:
        sync = WeightSyncConfig.model_validate(
            {"rendezvous_deadline_s": PATIENCE_S, "transfer_deadline_s": PATIENCE_S} | deadlines
        )
        await work(LearnerGroup(lambda: [rank], config().learner, sync, "nccl", 1))

    asyncio.run(run())


def test_a_rank_that_is_stuck_is_freed_and_takes_the_next_connection(make_rank: Callable[..., Any]) -> None:
    rank = make_rank(is_freed=True)
    with pytest.raises(TransferFailed, match="send_weights missed its deadline of 1 s"):
        on_group(rank, lambda group: group.send_weights(1), transfer_deadline_s=1.0)
    on_group(rank, lambda group: group.open_transfer([]))
    ((address, port),) = ray.get(rank.meeting_points.remote(), timeout=PATIENCE_S)
    assert address and port


def test_a_rank_that_stays_stuck_is_lost(make_rank: Callable[..., Any]) -> None:
    rank = make_rank(is_freed=False)
    stuck = rank.send_weights.remote(1)
    assert ray.get([rank.address.remote(), rank.free_port.remote()], timeout=PATIENCE_S)  # they do not queue behind it
    with pytest.raises(LearnerLost, match="which was aborted"):
        on_group(rank, lambda group: group.send_weights(1), transfer_deadline_s=1.0, rendezvous_deadline_s=2.0)
    with pytest.raises(RayActorError):
        ray.get(stuck, timeout=PATIENCE_S)


def test_the_death_of_one_engine_is_noticed_before_the_others_answer() -> None:
    """`wait` of weight_sync/sender.py needs it."""
    engines = [Engine.remote() for _ in range(2)]  # type: ignore[attr-defined]
    with pytest.raises(RayActorError):
        ray.get([engines[0].hang.remote(), engines[1].die.remote()], timeout=PATIENCE_S / 2)
    ray.kill(engines[0])
