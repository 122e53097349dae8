"""Engine and learner hold the same policy, before and after updates; checkpoints and exports are whole."""

import asyncio
import hashlib
import math
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM

from quatro_ray.engines.checkpoint_store import digest_files
from quatro_ray.orchestrator.stall_report import stall_report
from quatro_ray.replay.buffer import LeasedBatch
from quatro_ray.replay.staleness import Lineage
from quatro_ray.types import Query, RolloutGroup, SamplingParams
from quatro_ray.weight_sync.agreement import mean_difference
from tests.make import pack_all
from tests.real.conftest import Ring

SAMPLING = SamplingParams(temperature=0.8, top_p=1.0, max_tokens=24, seed=3)


def sample(ring: Ring, count: int = 4, max_tokens: int = 24) -> tuple[RolloutGroup, ...]:
    """Scored groups straight from the engine; rewards alternate, so that there is something to learn."""

    async def one(i: int) -> RolloutGroup:
        _, ref = await ring.generator.generate(
            i, Query(str(i), f"{10 + i}+34=", "44"), replace(SAMPLING, max_tokens=max_tokens, seed=i), 4
        )
        _, scored = await ring.parts.verifiers.score(ref)
        return await scored

    async def all_of_them() -> list[RolloutGroup]:
        return await asyncio.gather(*(one(i) for i in range(count)))

    groups = ring.run(all_of_them())
    return tuple(
        replace(
            g, rollouts=tuple(replace(r, score=replace(r.score, reward=float(i % 2))) for i, r in enumerate(g.rollouts))
        )
        for g in groups
    )


def disagreement(ring: Ring, groups: tuple[RolloutGroup, ...]) -> float:
    """Mean |behaviour − recomputed| log-prob over all response tokens."""
    batches = pack_all(
        groups,
        Lineage.unbroken(version(ring)),
        num_ranks=2,
        tokens_per_micro_batch=ring.config.learner.tokens_per_micro_batch,
    )
    recomputed = ring.on_ranks("logprobs", groups)
    errors = [
        np.abs(values - micro.behavior_logprobs)[micro.is_response]
        for batch, per_rank in zip(batches, recomputed, strict=True)
        for micro, values in zip(batch.micro_batches, per_rank, strict=True)
    ]
    return float(np.concatenate(errors).mean())


def version(ring: Ring) -> int:
    return ring.run(ring.generator.policy_version())


def train(ring: Ring, groups: tuple[RolloutGroup, ...]) -> dict:
    leased = LeasedBatch(groups, Lineage.unbroken(version(ring)))
    return ring.run(ring.parts.learner.train_step(leased, version(ring)))


def test_a_cluster_of_one_machine_listens_on_loopback(ring: Ring) -> None:
    me = psutil.Process()
    open_ports = [name for p in [me, *me.children(recursive=True)] for name in listeners_beyond_loopback(p)]
    assert not open_ports


def listeners_beyond_loopback(process: psutil.Process) -> list[str]:
    """The name of the process, once for each such port; none if the process has ended."""
    try:
        return [
            process.name()
            for c in process.net_connections("inet")
            if c.status == psutil.CONN_LISTEN and not ip_address(c.laddr.ip.removeprefix("::ffff:")).is_loopback
        ]
    except psutil.NoSuchProcess:
        return []


def test_behaviour_logprobs_are_the_learners_own(ring: Ring) -> None:
    """At temperature 0.8, so that logits before scaling would show."""
    groups = sample(ring)
    assert all(r.score is not None and len(r.behavior_logprobs) == r.num_tokens for g in groups for r in g.rollouts)
    assert disagreement(ring, groups) < 1e-3


PACKED_AWAY = hashlib.sha256(b"").hexdigest()
"""vLLM on CPU keeps only a packed copy of a linear layer's weight: what is left of the parameter is empty."""


def test_after_an_update_the_engine_has_the_learners_weights(ring: Ring, tmp_path: Path) -> None:
    """By checksum where the engine still has the tensor, and by log-probs, which go through the packed copies."""
    engine = ring.cluster.generators()[0]
    before = ray.get(engine.weight_checksums.remote(), timeout=60)
    start, old = version(ring), sample(ring)
    for _ in range(2):
        metrics = train(ring, sample(ring))
        assert metrics["step/skipped"] == 0
        assert metrics["off_policy/staleness_max"] == 0
        update = ring.run(ring.parts.weight_sync.update(version(ring) + 1))
    assert update.version == version(ring) == start + 2
    expected = ring.run(ring.cluster.learner.score_fixed(30))
    scores = ring.run(ring.generator.score([s.token_ids for s in expected]))
    assert mean_difference(expected, scores) < 1e-3
    after = ray.get(engine.weight_checksums.remote(), timeout=60)
    assert all((after[n] == before[n]) == (after[n] == PACKED_AWAY) for n in before)

    ring.run(ring.parts.learner.export(tmp_path / "export", 60))
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32).state_dict()
    expected = {f"dp0:pp0:pcp0:tp0:{name}": digest for name, digest in engine_digests(state).items()}
    assert expected.keys() == after.keys()
    compared = [name for name in after if after[name] != PACKED_AWAY]
    assert len(compared) >= 7
    assert {n: after[n] for n in compared} == {n: expected[n] for n in compared}

    assert disagreement(ring, old) > 0.01  # the policy has moved, so that old weights anywhere would show
    assert disagreement(ring, sample(ring)) < 1e-3


def engine_digests(state: dict[str, torch.Tensor]) -> dict[str, str]:
    """SHA-256 of the tensors as vLLM holds them: projections fused, vocabulary padded to a multiple of 64."""
    fused: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if name == "lm_head.weight":
            continue
        for target, parts in (
            ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
            ("gate_up_proj", ("gate_proj", "up_proj")),
        ):
            if any(f".{p}." in name for p in parts):
                first = next(p for p in parts if f".{p}." in name)
                names = [name.replace(first, p) for p in parts]
                name, tensor = name.replace(first, target), torch.cat([state[n] for n in names])
        if name == "model.embed_tokens.weight":
            tensor = torch.nn.functional.pad(tensor, (0, 0, 0, -len(tensor) % 64))
        fused[name] = tensor
    return {
        n: hashlib.sha256(t.contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest() for n, t in fused.items()
    }


def test_requests_in_flight_go_on_under_the_new_version(ring: Ring) -> None:
    start = version(ring)
    train(ring, sample(ring))

    async def update_in_the_middle() -> tuple[RolloutGroup, int]:
        generator = ring.generator
        running = asyncio.ensure_future(
            generator.generate(0, Query("q", "1+1=", "2"), replace(SAMPLING, max_tokens=200), 4)
        )
        while (await generator.load()).num_running == 0:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.05)
        update = await ring.parts.weight_sync.update(start + 1)
        _, ref = await running
        return await ref, update.num_in_flight

    group, in_flight = ring.run(update_in_the_middle())
    assert in_flight == 1
    for rollout in group.rollouts:
        assert rollout.spans[0].start == 0 and rollout.spans[-1].end == rollout.num_tokens
        assert all(a.end == b.start for a, b in zip(rollout.spans, rollout.spans[1:], strict=False))
    assert {v for r in group.rollouts for v in r.versions()} == {start, start + 1}


def test_a_loss_that_is_not_finite_skips_the_step_on_all_ranks(ring: Ring, tmp_path: Path) -> None:
    groups = sample(ring)
    r = groups[0].rollouts[0]
    poisoned = replace(r, behavior_logprobs=np.full_like(r.behavior_logprobs, np.nan))
    bad = (replace(groups[0], rollouts=(poisoned, *groups[0].rollouts[1:])), *groups[1:])
    before = ring.on_ranks("logprobs", groups)
    metrics = train(ring, bad)
    assert metrics["step/skipped"] == 1
    after = ring.on_ranks("logprobs", groups)
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(np.concatenate(a), np.concatenate(b))
    ring.run(ring.parts.weight_sync.update(version(ring) + 1))
    assert train(ring, sample(ring))["step/skipped"] == 0  # and the next one is well again


def test_reference_kl_is_positive_once_the_policy_has_moved(ring: Ring) -> None:
    """The reference is the starting policy."""
    train(ring, sample(ring))
    ring.run(ring.parts.weight_sync.update(version(ring) + 1))
    metrics = train(ring, sample(ring))
    assert 0 < metrics["policy/reference_kl"] < math.inf


def test_the_checkpoint_is_deepspeeds(ring: Ring, tmp_path: Path) -> None:
    folder = tmp_path / "step_1.writing"
    folder.mkdir()
    digests = ring.run(ring.parts.learner.save_checkpoint(folder, 60))
    assert digests == digest_files(folder)
    assert sum(name.endswith("optim_states.pt") for name in digests) == 2


def test_a_stall_report_has_the_stacks_of_busy_actors(ring: Ring, tmp_path: Path) -> None:
    async def work() -> str:
        query = Query("q", "1+1=", "2")
        busy = asyncio.ensure_future(ring.generator.generate(0, query, replace(SAMPLING, max_tokens=190), 8))
        short = await stall_report(ring.parts, tmp_path, 3)
        await busy
        return short

    assert "version 3" in ring.run(work())
    text = (tmp_path / "stall.txt").read_text()
    for part in ("generator 0 (healthy): stacks", "learner rank 0: stacks", "learner rank 1: stacks"):
        stacks = text.split(f"=== {part}\n")[1].split("\n===")[0]
        assert "MainThread" in stacks and 'File "' in stacks
    assert "does not answer" not in text


def test_a_prompt_that_is_too_long_is_refused_by_name(ring: Ring) -> None:
    generator = ring.generator
    with pytest.raises(ValueError, match="max_prompt_tokens=16"):
        ring.run(generator.generate(0, Query("q", "1" * 17, "1"), SAMPLING, 2))
