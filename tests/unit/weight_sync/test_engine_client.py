"""Rank 0's calls of all engines: their arguments, their deadlines, and what a failure sets off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from quatro_ray.weight_sync.engine_client import EngineClient


class Calls:
    """Records every call; each group of calls takes `takes_s` seconds on the test's clock, or fails."""

    def __init__(self) -> None:
        self.made: list[Any] = []
        self.deadlines_s: list[float] = []
        self.now_s = self.takes_s = 0.0
        self.error: Exception | None = None
        self.failures: list[str] = []

    def submit(self, engine: Any, method: str, *args: Any) -> None:
        self.made.append((engine, method, *args))

    def wait(self, futures: list[Any], seconds: float) -> None:
        self.deadlines_s.append(seconds)
        self.now_s += self.takes_s
        if self.error is not None:
            raise self.error

    def client(self) -> EngineClient:
        return EngineClient(
            ["a", "b"],
            self.submit,
            self.wait,
            workers_per_engine=2,
            rendezvous_deadline_s=7,
            transfer_deadline_s=9,
            on_failure=self.failures.append,
        )


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    made = Calls()
    monkeypatch.setattr("time.monotonic", lambda: made.now_s)
    return made


def test_each_engine_has_its_own_ranks(calls: Calls) -> None:
    calls.client().init_weight_transfer_engine({"rank_offset": 1, "world_size": 5})
    assert [info["rank_offset"] for _, _, info in calls.made] == [1, 3]
    assert calls.deadlines_s == [7] and not calls.failures


def test_the_engines_are_stamped_with_the_version_of_the_update(calls: Calls) -> None:
    client = calls.client()
    client.begin_update(12)
    client.finish_weight_update()
    assert calls.made == [("a", "finish_weight_update", 12), ("b", "finish_weight_update", 12)]


def test_the_calls_of_an_update_share_its_deadline(calls: Calls) -> None:
    client = calls.client()
    calls.takes_s = 4.0
    for start in (0.0, 12.0):
        assert calls.now_s == start
        client.begin_update(1)
        client.start_weight_update()
        client.update_weights({})
        client.finish_weight_update()
    assert calls.deadlines_s == [9, 5, 1] * 2


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.init_weight_transfer_engine({"rank_offset": 1}),
        lambda client: client.start_weight_update(),
        lambda client: client.update_weights({}),
        lambda client: client.finish_weight_update(),
    ],
    ids=["init", "start", "update", "finish"],
)
def test_a_failure_is_told_before_it_is_raised(calls: Calls, call: Callable[[EngineClient], None]) -> None:
    calls.error = RuntimeError("the engine died")
    with pytest.raises(RuntimeError, match="the engine died"):
        call(calls.client())
    (why,) = calls.failures
    assert why.endswith(" failed: the engine died")
