"""An update resumes the engines whatever happens, keeps its deadlines, and checks the version."""

import asyncio
from typing import Any

import pytest

from quatro_ray.config import WeightSyncConfig
from quatro_ray.errors import WeightSyncError
from quatro_ray.weight_sync.client import EngineClient
from quatro_ray.weight_sync.update import WeightSync


class Engine:
    def __init__(self, running: int = 2, stuck_in: str = "") -> None:
        self.running, self.stuck_in = running, stuck_in
        self.version, self.paused, self.calls = 0, False, []  # type: ignore[var-annotated]

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

    async def policy_version(self) -> int:
        return self.version


CONFIG = WeightSyncConfig(pause_deadline_s=0.1, transfer_deadline_s=0.1, resume_deadline_s=0.1)


def sync(engines: list[Engine], send: Any) -> WeightSync:
    return WeightSync(engines, send, CONFIG)


def sender(engines: list[Engine], offset: int = 0, error: Exception | None = None, seconds: float = 0) -> Any:
    async def send(version: int) -> None:
        assert all(e.paused for e in engines)
        await asyncio.sleep(seconds)
        if error:
            raise error
        for engine in engines:
            engine.version = version + offset

    return send


def test_a_whole_update() -> None:
    engines = [Engine(2), Engine(3)]
    update = asyncio.run(sync(engines, sender(engines)).update(4))
    assert (update.version, update.num_in_flight) == (4, 5)
    assert all(e.calls == ["pause", "resume"] for e in engines)


@pytest.mark.parametrize("problem", [{"error": RuntimeError("lost")}, {"seconds": 9.0}])
def test_engines_are_resumed_after_a_failed_transfer(problem: dict[str, Any]) -> None:
    engines = [Engine()]
    with pytest.raises((RuntimeError, WeightSyncError)):
        asyncio.run(sync(engines, sender(engines, **problem)).update(1))
    assert not engines[0].paused


@pytest.mark.parametrize("phase", ["pause", "resume"])
def test_every_phase_has_its_deadline_and_is_named(phase: str) -> None:
    engines = [Engine(stuck_in=phase)]
    with pytest.raises(WeightSyncError, match=f"phase '{phase}' missed its deadline of 0.1 s"):
        asyncio.run(sync(engines, sender(engines)).update(1))


def test_a_version_that_did_not_arrive_is_an_error() -> None:
    engines = [Engine()]
    with pytest.raises(WeightSyncError, match=r"version 5 the engines report \[4\]"):
        asyncio.run(sync(engines, sender(engines, offset=-1)).update(5))


def test_the_client_gives_each_engine_its_own_ranks_and_stamps_the_version() -> None:
    calls: list[Any] = []
    client = EngineClient(
        ["a", "b"],
        submit=lambda engine, method, *args: calls.append((engine, method, *args)),
        wait=lambda futures, seconds: calls.append(seconds) or [],  # type: ignore[func-returns-value]
        workers_per_engine=2,
        rendezvous_deadline_s=7,
        transfer_deadline_s=9,
    )
    client.init_weight_transfer_engine({"rank_offset": 1, "world_size": 5})
    assert [c[2]["rank_offset"] for c in calls[:2]] == [1, 3]
    assert calls[2] == 7
    calls.clear()
    client.version = 12
    client.finish_weight_update()
    assert calls == [("a", "finish_weight_update", 12), ("b", "finish_weight_update", 12), 9]
