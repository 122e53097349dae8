"""The room of engines: it is waited for through outages of the head node, and given back when nobody will use it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest
from ray.exceptions import RpcError

from quatro_ray.config import Config
from quatro_ray.orchestrator import engine_places, placement
from quatro_ray.orchestrator.engine_places import EnginePlaces
from quatro_ray.orchestrator.placement import Placer
from quatro_ray.orchestrator.resources import bundles, placement_groups
from quatro_ray.simulation.virtual_loop import VirtualLoop
from tests.make import config

T = TypeVar("T")
NO_ANSWER = RpcError("failed to connect to all addresses")
COLOCATED: dict[str, Any] = {"cluster": {"colocate": True}, "learner": {"num_ranks": 2}}


@dataclass(frozen=True)
class Group:
    id: int


class Head:
    """Answers about placement groups with `answers`, one after the other, and then again and again with the last."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answers: Any) -> None:
        self.answers = list(answers)
        self.removed: list[int] = []
        self.num_made = 0
        monkeypatch.setattr(engine_places, "placement_group_table", lambda group: self.answer())
        monkeypatch.setattr(engine_places, "placement_group", lambda bundles: self.make())
        for module in (engine_places, placement):
            monkeypatch.setattr(module, "remove_placement_group", self.remove)

    def make(self) -> Group:
        self.num_made += 1
        return Group(1000 + self.num_made)

    def answer(self) -> Any:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def remove(self, group: Group) -> None:
        if self.answers:
            self.answer()
        self.removed.append(group.id)


def placer(config: Config) -> Placer:
    """Return it with the groups of a run, whose ids are their positions in the plan."""
    placer = Placer(config)
    for number, group in enumerate(placement_groups(bundles(config))):
        placer.add(group, Group(number))
    return placer


def wait(work: Coroutine[Any, Any, T]) -> T:
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(asyncio.wait_for(work, 3600))
    finally:
        loop.close()


READY, PENDING = {"state": "CREATED"}, {"state": "PENDING"}


@pytest.mark.parametrize("is_new", [False, True])
def test_the_wait_for_room_outlasts_the_head(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, is_new: bool
) -> None:
    head = Head(monkeypatch, PENDING, NO_ANSWER, NO_ANSWER, {}, PENDING, NO_ANSWER, READY, PENDING)
    place = placer(config(generator={"num_engines": 1, "max_engines": 2}))
    with caplog.at_level(logging.WARNING):
        wait(EnginePlaces(place).room(1 if is_new else 0))
    assert head.answers == [PENDING]
    assert place.group_of("generator", int(is_new)) is not None
    assert len(caplog.messages) == 2, "a line for each outage"
    assert all("failed to connect" in line for line in caplog.messages)


def test_an_engine_that_is_given_up_gives_its_room_back(monkeypatch: pytest.MonkeyPatch) -> None:
    head = Head(monkeypatch, NO_ANSWER, None)
    place = placer(config(generator={"num_engines": 2}))
    group, other = (place.group_of("generator", index) for index in (1, 0))
    assert group is not None and other is not None
    wait(EnginePlaces(place).give_back(1))
    assert head.removed == [group.id]
    assert group not in place.groups() and other in place.groups()


def test_so_does_one_that_joined_later(monkeypatch: pytest.MonkeyPatch) -> None:
    head = Head(monkeypatch, READY)
    places = EnginePlaces(place := placer(config(generator={"num_engines": 1, "max_engines": 2})))
    wait(places.room(1))
    wait(places.give_back(1))
    assert head.num_made == 1 and head.removed == [1001]
    place.release()
    assert len(head.removed) == len(set(head.removed)) > 1


def test_room_that_a_rank_shares_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    head = Head(monkeypatch, READY)
    place = placer(config(generator={"num_engines": 2}, **COLOCATED))
    group = place.group_of("generator", 1)
    assert group is not None and group == place.group_of("learner", 1)
    for index in (0, 1):
        wait(EnginePlaces(place).give_back(index))
    assert head.removed == [] and group in place.groups()
