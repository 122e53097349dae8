"""Simulated engines against a count of single tokens, and whole simulated runs against what arithmetic says of them."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any, TypeVar

import pytest

from quatro_ray.config import Config
from quatro_ray.config.data import FilterConfig
from quatro_ray.failures import EngineLost
from quatro_ray.simulation.decoding import Batch, EngineSpeed
from quatro_ray.simulation.engine import SimulatedEngine
from quatro_ray.simulation.ring import Simulated, simulate
from quatro_ray.simulation.virtual_loop import VirtualLoop
from quatro_ray.simulation.workload import Lengths, Workload
from quatro_ray.types import Query, RolloutGroup, SamplingParams
from tests.make import config as make_config

SPEED = EngineSpeed(iteration_s=0.01, sequence_s=1e-3, context_s=1e-6, max_num_seqs=8)
WORKLOAD = Workload(
    Lengths(median=100, sigma=0.0, longest=100), SPEED, step_s=1.0, token_s=0.0, transfer_s=0.5, verify_s=0.0
)
T = TypeVar("T")


def in_virtual_time(work: Callable[[VirtualLoop], Coroutine[Any, Any, T]]) -> T:
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(work(loop))
    finally:
        loop.close()


def test_the_loop_never_really_waits() -> None:
    """Not after a timer was cancelled, either, which the loop of asyncio discards only after it has looked at it."""
    waited: list[float | None] = []

    async def run(loop: VirtualLoop) -> float:
        selector = loop._selector  # type: ignore[attr-defined]
        select = selector.select

        def look(timeout: float | None = None) -> Any:
            waited.append(timeout)
            return select(0)

        selector.select = look
        for _ in range(3):
            loop.call_later(5.0, print).cancel()
            await asyncio.sleep(100.0)
        selector.select = select
        return loop.time()

    assert in_virtual_time(run) == 300.0
    assert set(waited) == {0}


def token_by_token(lengths: list[int], speed: EngineSpeed) -> list[float]:
    """Return when each sequence ends, with an iteration after the other; sequences begin in their order."""
    waiting, ends, now = list(enumerate(lengths)), [0.0] * len(lengths), 0.0
    running: list[list[int]] = []
    while waiting or running:
        while waiting and len(running) < speed.max_num_seqs:
            number, length = waiting.pop(0)
            running.append([number, length, 0])
        context = sum(done for _, _, done in running)
        now += speed.iteration_s + speed.sequence_s * len(running) + speed.context_s * context
        for one in running:
            one[2] += 1
        for number, length, done in running:
            ends[number] = now if length == done else ends[number]
        running = [one for one in running if one[1] > one[2]]
    return ends


def test_an_engine_takes_as_long_as_its_single_iterations() -> None:
    rng = random.Random(0)
    lengths = [rng.randint(1, 300) for _ in range(40)]
    expected, found, now = token_by_token(lengths, SPEED), [0.0] * 40, 0.0
    batch, waiting = Batch(SPEED), list(enumerate(lengths))
    while waiting or len(batch):
        while waiting and not batch.is_full():
            batch.add(*waiting.pop(0))
        whole = batch.seconds_to_next_end()
        batch.advance(whole / 3)  # an interruption changes nothing
        assert batch.seconds_to_next_end() == pytest.approx(whole * 2 / 3)
        now += whole
        found[batch.pop_next()] = now
    assert found == pytest.approx(expected, rel=1e-3)
    assert batch.num_sampled == pytest.approx(sum(lengths))


async def one_group(engine: SimulatedEngine, size: int) -> RolloutGroup:
    return (await engine.generate(1, Query("q", "p", "a"), SamplingParams(1.0, 1.0, 9, 0), size))[1]


def test_tokens_have_the_version_that_the_engine_had_and_a_pause_samples_none() -> None:
    async def run(loop: VirtualLoop) -> tuple[RolloutGroup, float]:
        engine = SimulatedEngine(WORKLOAD)
        engine.live()
        group = asyncio.ensure_future(one_group(engine, 2))
        await asyncio.sleep(0.3)  # two sequences: 12 ms an iteration
        assert await engine.pause() == 1
        before = (await engine.load()).num_sampled_tokens
        await asyncio.sleep(50.0)
        assert (await engine.load()).num_sampled_tokens == before
        engine.receive(1)
        await engine.resume()
        return await group, loop.time()

    group, seconds = in_virtual_time(run)
    assert seconds == pytest.approx(50 + 100 * 0.012, rel=0.01)
    assert [[(s.version, s.start, s.end) for s in r.spans] for r in group.rollouts] == [[(0, 0, 25), (1, 25, 100)]] * 2


def test_a_killed_engine_loses_its_groups() -> None:
    async def run(loop: VirtualLoop) -> None:
        engine = SimulatedEngine(WORKLOAD)
        engine.live()
        group = asyncio.ensure_future(one_group(engine, 2))
        await asyncio.sleep(0.3)
        engine.kill()
        with pytest.raises(EngineLost, match="it was killed"):
            await group
        with pytest.raises(EngineLost):
            await engine.load()

    in_virtual_time(run)


def config(**replay: Any) -> Config:
    generator = {"num_engines": 2, "max_groups_in_flight": 8, "max_num_seqs": 8}
    return make_config(
        run={"num_steps": 30},
        generator=generator | {"max_prompt_tokens": 8, "max_response_tokens": 8},
        replay={"groups_per_step": 8, "group_size": 2, "max_staleness": 4} | replay,
        checkpoint={"every_steps": None},
    )


def of_learner(found: Simulated, state: str) -> float:
    return found.time_share["learner"].get(state, 0.0)


def test_the_learner_sets_the_pace_if_it_is_slower() -> None:
    found = simulate(config(), replace(WORKLOAD, step_s=20.0), num_warmup_steps=10)
    assert found.step_s == pytest.approx(20.5, rel=1e-3)
    assert of_learner(found, "wait") < 0.01
    assert found.trained_tokens_per_s == pytest.approx(16 * 100 / 20.5, rel=1e-3)


def test_the_engines_set_the_pace_if_they_are_slower() -> None:
    """Two engines with eight sequences of 100 tokens, 18 ms an iteration; each update pauses them for 0.5 s."""
    found = simulate(config(), replace(WORKLOAD, step_s=0.1), num_warmup_steps=10)
    assert found.step_s == pytest.approx(100 * (0.018 + 4e-4) + 0.5, rel=0.03)
    assert found.time_share["generators"]["paused"] == pytest.approx(0.5 / found.step_s, rel=0.05)
    assert of_learner(found, "wait") > 0.5


def test_filters_of_rewards_do_not_stop_what_has_no_rewards() -> None:
    strict = config().model_copy(update={"filters": FilterConfig(drop_zero_variance=True, max_in_a_row=3)})
    assert simulate(strict, WORKLOAD, num_warmup_steps=10).drops == {}


def test_without_staleness_both_take_turns() -> None:
    found = simulate(config(max_staleness=0), WORKLOAD, num_warmup_steps=10)
    assert found.step_s == pytest.approx(100 * 0.018 + 0.5 + 1.0, rel=0.05)
    assert found.staleness_mean == 0


def test_a_run_is_the_same_when_it_is_repeated_and_survives_its_losses() -> None:
    fragile = replace(WORKLOAD, lengths=Lengths(100, 1.0, 400), engine_lives_s=20.0, start_s=2.0)
    found, again = (simulate(config(), replace(fragile, rng=random.Random(3)), num_warmup_steps=10) for _ in range(2))
    assert found.num_lost > 1
    assert replace(found, cpu_s_per_group=0.0) == replace(again, cpu_s_per_group=0.0)
    assert found.time_share["generators"]["start"] > 0
    for states in found.time_share.values():
        assert sum(states.values()) == pytest.approx(1)
