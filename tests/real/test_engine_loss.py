"""What an engine had sampled when its process died is gone on with by another."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from transformers import AutoTokenizer

from quatro_ray.actors.generator_client import GeneratorClient
from quatro_ray.failures import EngineLost
from quatro_ray.types import Query, Rollout, RolloutGroup, SamplingParams, Score
from tests.make import config
from tests.real.conftest import start_ring
from tests.real.ring.test_ring import disagreement

QUERY, SAMPLING, SIZE = Query("q", "12+34=", "46"), SamplingParams(0.8, 1.0, 200, 5), 4


async def begin(engine: GeneratorClient, begun: tuple[Rollout, ...] = ()) -> tuple[Rollout, ...]:
    """What there is of a group whose engine is killed in the middle of it."""
    pid = await engine.actor.__ray_call__.remote(lambda _: os.getpid())
    (core,) = [p for p in psutil.Process(pid).children() if "VLLM::EngineCore" in " ".join(p.cmdline())]
    before = (await engine.load()).num_sampled_tokens
    generating = asyncio.ensure_future(engine.generate(7, QUERY, SAMPLING, SIZE, begun))
    while (await engine.load()).num_sampled_tokens < before + 40:
        await asyncio.sleep(0.005)
    await engine.pause()  # so that all tokens have arrived
    core.kill()
    with pytest.raises(EngineLost, match="the engine's process died") as lost:
        await generating
    return lost.value.begun


def check_goes_on(before: tuple[Rollout, ...], after: tuple[Rollout, ...]) -> None:
    """Nothing that was sampled is lost or sampled again, and what was unfinished is longer."""
    assert len(before) == len(after) == SIZE
    for old, new in zip(before, after, strict=True):
        assert np.array_equal(new.token_ids[: old.num_tokens], old.token_ids)
        assert np.array_equal(new.behavior_logprobs[: old.num_tokens], old.behavior_logprobs)
        assert [(s.version, s.start, s.end) for s in new.spans] == [(0, 0, new.num_tokens)]
        assert old.finish_reason or new.num_tokens > old.num_tokens


def test_another_engine_goes_on(local_ray: None, model_path: str, tmp_path: Path) -> None:
    made = config(
        tmp_path / "run",
        generator={"max_response_tokens": 200, "temperature": 0.8, "num_engines": 3},
        learner={"tokens_per_micro_batch": 512},
        cluster={"cpus_per_engine": 0.2},
    )
    ring = start_ring(made, model_path)
    try:
        third, first, second = ring.generators
        begun = ring.run(begin(first))
        further = ring.run(begin(second, begun))
        assert sum(r.num_tokens for r in begun) >= 40 and any(not r.finish_reason for r in further)
        check_goes_on(begun, further)

        async def finish() -> RolloutGroup:
            _, group = await third.generate(7, QUERY, SAMPLING, SIZE, further)
            return await group

        group = ring.run(finish())
        check_goes_on(further, group.rollouts)
        tokenizer = AutoTokenizer.from_pretrained(model_path)
        for rollout in group.rollouts:
            assert rollout.finish_reason in ("stop", "length") and rollout.num_tokens <= SAMPLING.max_tokens
            is_ended = rollout.finish_reason == "stop"
            assert rollout.text == tokenizer.decode(rollout.token_ids[: -1 if is_ended else None])
        assert len({r.token_ids.tobytes() for r in group.rollouts}) == SIZE
        scored = tuple(replace(r, score=Score(float(i % 2))) for i, r in enumerate(group.rollouts))
        assert disagreement(ring, (replace(group, rollouts=scored),)) < 1e-3
    finally:
        ring.cluster.shutdown()
