"""Two ZeRO-3 ranks by themselves: step control, splits into micro-batches, every objective."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import ray
from pydantic import TypeAdapter

from quatro_ray.actors.learner import LearnerActor
from quatro_ray.config import LearnerConfig, ObjectiveConfig
from quatro_ray.engines.learner_spec import LearnerSpec
from quatro_ray.replay.buffer import LeasedBatch
from quatro_ray.replay.staleness import Lineage
from quatro_ray.types import Outcome, Query, Rollout, RolloutGroup, Score, VersionSpan
from tests.make import pack_all

NUM_QUERIES, GROUP_SIZE = 6, 4


class Learners:
    def __init__(self, actors: list[Any], config: LearnerConfig) -> None:
        self.actors, self.config = actors, config

    def call(self, method: str, *args: Any) -> list[Any]:
        return ray.get([getattr(a, method).remote(*args) for a in self.actors], timeout=120)

    def logprobs(self, groups: tuple[RolloutGroup, ...]) -> dict[int, np.ndarray]:
        """By cell of [Q·G]: float32 [T]."""
        batches = pack_all(
            groups,
            Lineage.unbroken(0),
            num_ranks=2 // self.config.sequence_parallel_size,
            tokens_per_micro_batch=self.config.tokens_per_micro_batch,
            num_minibatches=self.config.num_minibatches,
        )
        found: dict[int, np.ndarray] = {}
        per_group = self.call("logprobs", groups)[:: self.config.sequence_parallel_size]
        for batch, per_rank in zip(batches, per_group, strict=True):
            for micro, values in zip(batch.micro_batches, per_rank, strict=True):
                for cell in set(micro.rollout_index.tolist()) - {-1}:
                    found[cell] = values[(micro.rollout_index == cell) & micro.is_response]
        return found

    def train(self, groups: tuple[RolloutGroup, ...], version: int = 0) -> dict[str, Any]:
        first, second = self.call("train_step", LeasedBatch(groups, Lineage.unbroken(version)), version)
        assert first == second  # what a step says is the same on every rank
        return first


@contextmanager
def learners(model_path: str, objective: str = "quatro", **settings: Any) -> Iterator[Learners]:
    chosen: ObjectiveConfig = TypeAdapter(ObjectiveConfig).validate_python({"kind": objective})
    fields = {"num_ranks": 2, "learning_rate": 1e-2, "dtype": "float32", "tokens_per_micro_batch": 512} | settings
    config = LearnerConfig.model_validate(fields)
    env = {"env_vars": {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}}
    made = LearnerActor.options(num_cpus=0.5, runtime_env=env)  # type: ignore[attr-defined]
    spec = LearnerSpec(
        model_path=model_path,
        config=config,
        objective=chosen,
        device="cpu",
        temperature=1.0,
        max_response_tokens=9,
        seed=0,
        num_steps=9,
    )
    actors = [made.remote(spec, rank=i) for i in range(2)]
    try:
        head = [actors[0].address.remote(), actors[0].free_port.remote()]
        address, port = ray.get(head, timeout=300)
        ray.get([a.start.remote(address, port) for a in actors], timeout=240)
        yield Learners(actors, config)
    finally:
        for actor in actors:
            ray.kill(actor)


def random_groups() -> tuple[RolloutGroup, ...]:
    rng = np.random.default_rng(0)

    def one() -> Rollout:
        tokens = rng.integers(2, 200, int(rng.integers(2, 9))).astype(np.int32)
        spans = (VersionSpan(0, 0, len(tokens)),)
        score = Score(float(rng.integers(0, 2)), Outcome.OK, "")
        return Rollout(tokens, np.zeros(len(tokens), np.float32), spans, "", "stop", score)

    prompt = np.arange(5, 9, dtype=np.int32)
    return tuple(
        RolloutGroup(q, Query(str(q), "x", "y"), prompt, tuple(one() for _ in range(GROUP_SIZE)))
        for q in range(NUM_QUERIES)
    )


def on_policy(ranks: Learners, groups: tuple[RolloutGroup, ...]) -> tuple[RolloutGroup, ...]:
    """The same rollouts with the learner's own log-probs as those of the behaviour policy."""
    known = ranks.logprobs(groups)
    return tuple(
        replace(
            g,
            rollouts=tuple(replace(r, behavior_logprobs=known[q * GROUP_SIZE + i]) for i, r in enumerate(g.rollouts)),
        )
        for q, g in enumerate(groups)
    )


def mean_kl(before: dict[int, np.ndarray], after: dict[int, np.ndarray]) -> float:
    """Mean over queries of the mean over their tokens of ρ − 1 − log ρ, ρ = after/before; samples are on policy."""
    per_query = []
    for q in range(NUM_QUERIES):
        cells = range(q * GROUP_SIZE, (q + 1) * GROUP_SIZE)
        d = np.concatenate([after[c] - before[c] for c in cells]).astype(np.float64)
        per_query.append(np.mean(np.expm1(d) - d))
    return float(np.mean(per_query))


def change(before: dict[int, np.ndarray], after: dict[int, np.ndarray]) -> np.ndarray:
    return np.concatenate([after[c] - before[c] for c in sorted(before)])


def test_step_control_moves_the_shards_back_along_the_step(local_ray: None, model_path: str) -> None:
    """A step that is far too long ends on its budget; the next one is taken from there, by all ranks."""
    limits = {"window_kl_nats_per_token": 0.01, "max_kl_nats_per_token": 4e-4, "probe_share": 1.0}
    with learners(model_path, learning_rate=3e-3, step_control=limits) as ranks:
        groups = on_policy(ranks, random_groups())
        before = ranks.logprobs(groups)
        metrics = ranks.train(groups)
        after = ranks.logprobs(groups)
        # staleness 0: the budget of every query is max_kl_nats_per_token
        assert 0.5 < metrics["step_control/share_of_budget"] < 1.42
        assert 0 < metrics["step_control/kept"] < 0.3
        assert mean_kl(before, after) == pytest.approx(4e-4, rel=0.2)
        # old samples now: staleness 1, and what the budget allows is still max_kl_nats_per_token (0.01/2 is more)
        second = ranks.train(groups, 1)
        assert mean_kl(after, ranks.logprobs(groups)) < 4e-4 * 1.5
        assert second["off_policy/staleness_max"] == 1
    with learners(model_path, learning_rate=3e-3, step_control={"window_kl_nats_per_token": None}) as ranks:
        start = ranks.logprobs(groups)
        free = ranks.train(groups)
        assert "step_control/kept" not in free
        uncontrolled = ranks.logprobs(groups)
    assert change(before, start) == pytest.approx(0, abs=1e-5)
    assert mean_kl(before, uncontrolled) > 4e-3
    # it is the same step, only shorter
    assert np.corrcoef(change(before, after), change(before, uncontrolled))[0, 1] > 0.8


def test_a_step_within_its_budget_is_untouched(local_ray: None, model_path: str) -> None:
    results = []
    for window in (None, 100.0):
        limits = {"window_kl_nats_per_token": window, "max_kl_nats_per_token": 100.0}
        with learners(model_path, learning_rate=1e-4, step_control=limits) as ranks:
            groups = on_policy(ranks, random_groups())
            metrics = ranks.train(groups)
            results.append(ranks.logprobs(groups))
    assert metrics["step_control/acted"] == 0
    assert metrics["step_control/share_of_budget"] < 1e-3
    assert change(*results).tolist() == [0.0] * len(change(*results))  # measuring leaves no trace, to the bit


def test_two_minibatches_are_two_optimiser_steps_around_one_proximal_policy(local_ray: None, model_path: str) -> None:
    off = {"window_kl_nats_per_token": None}
    fields: dict[str, Any] = {"learning_rate": 1e-2, "step_control": off}
    with learners(model_path, "grpo", **fields) as ranks:
        groups = on_policy(ranks, random_groups())
        half = NUM_QUERIES // 2
        ranks.train(groups[:half])
        ranks.train(groups[half:], 1)
        apart = ranks.logprobs(groups)
    with learners(model_path, "grpo", num_minibatches=2, **fields) as ranks:
        metrics = ranks.train(groups)
        together = ranks.logprobs(groups)
        assert (metrics["step/skipped"], metrics["step/uninformative"]) == (0, 0)
        # around the policy before the first step, the clip acts in the second one
        assert metrics["policy_gradient/limited_share"] > 0
    assert change(apart, together) == pytest.approx(0, abs=1e-4)


def test_the_entropy_bonus_acts_below_its_target(local_ray: None, model_path: str) -> None:
    """No policy reaches the target, so the coefficient rises with each step, and the loss falls by it."""
    fields = {"entropy_target_nats": 99.0, "entropy_coef_step": 5.0, "learning_rate": 1e-4}
    with learners(model_path, "grpo", **fields) as ranks:
        groups = on_policy(ranks, random_groups())
        first, second, third = (ranks.train(groups, version) for version in range(3))
    assert [m["policy/entropy_coef"] for m in (first, second, third)] == [0.0, 5.0, 10.0]
    bonus = [m["policy_gradient/loss"] - first["policy_gradient/loss"] for m in (second, third)]
    assert bonus == pytest.approx([-5 * second["policy/entropy"], -10 * third["policy/entropy"]], rel=0.05)


def test_a_batch_without_preference_changes_no_weight(local_ray: None, model_path: str) -> None:
    """The optimiser has momentum and weight decay by then, and the engine's log-probs differ from the learner's."""
    with learners(model_path, learning_rate=1e-3, weight_decay=0.1) as ranks:
        ranks.train(random_groups())
        groups = on_policy(ranks, random_groups())
        noise = np.random.default_rng(0)
        same = tuple(
            replace(
                g,
                rollouts=tuple(
                    replace(
                        r,
                        behavior_logprobs=r.behavior_logprobs + noise.normal(0, 0.02, r.num_tokens).astype(np.float32),
                        score=Score(0.0, Outcome.OK, ""),
                    )
                    for r in g.rollouts
                ),
            )
            for g in groups
        )
        before = ranks.logprobs(groups)
        metrics = ranks.train(same, 1)
        after = ranks.logprobs(groups)
        assert metrics["step/uninformative"] == 1 and metrics["step/skipped"] == 0
        assert metrics["policy/entropy"] > 0
        assert change(before, after).tolist() == [0.0] * len(change(before, after))
        informative = ranks.train(groups, 2)
        assert informative["step/uninformative"] == 0
        assert np.abs(change(before, ranks.logprobs(groups))).max() > 0


def test_the_split_into_micro_batches_changes_nothing(local_ray: None, model_path: str) -> None:
    """DeepSpeed accumulates the gradients here; tests/unit/engines/test_objectives.py tries all objectives."""
    changes, norms, counts = [], [], []
    off = {"window_kl_nats_per_token": None}
    for limit in (512, 60, 16):
        with learners(model_path, tokens_per_micro_batch=limit, learning_rate=1e-3, step_control=off) as ranks:
            groups = on_policy(ranks, random_groups())
            metrics = ranks.train(groups)
            counts.append(metrics["step/micro_batches_per_rank"])
            norms.append(metrics["step/grad_norm"])
            before = {
                q * GROUP_SIZE + i: r.behavior_logprobs for q, g in enumerate(groups) for i, r in enumerate(g.rollouts)
            }
            changes.append(change(before, ranks.logprobs(groups)))
    assert counts[:2] == [1, 2] and counts[2] >= 7
    assert norms[1:] == pytest.approx([norms[0]] * 2, rel=1e-3)
    for other in changes[1:]:
        # AdamW's first step goes by the sign of the gradient: where that is next to 0, rounding decides
        assert np.corrcoef(changes[0], other)[0, 1] > 0.99


@pytest.mark.parametrize("objective", ["m2po", "decoupled_ppo"])
def test_objectives_that_need_the_whole_batch_or_versions(local_ray: None, model_path: str, objective: str) -> None:
    with learners(model_path, objective) as ranks:
        metrics = ranks.train(on_policy(ranks, random_groups()))
        assert metrics["step/skipped"] == 0 and metrics["step/grad_norm"] > 0


def test_ways_to_divide_the_work_change_no_number(local_ray: None, model_path: str) -> None:
    """Ulysses over two ranks, where sums over ranks count each row once; and hpZ, whose copies a step makes stale."""
    found: list[tuple[dict[str, Any], dict[int, np.ndarray]]] = []
    groups = random_groups()
    ways: list[dict[str, Any]] = [{}, {"sequence_parallel_size": 2}, {"hpz_partition_size": 2}]
    for settings in ways:
        with learners(model_path, tokens_per_micro_batch=101, learning_rate=1e-3, **settings) as ranks:
            groups = groups if found else on_policy(ranks, groups)
            metrics = ranks.train(groups)
            found.append((metrics, ranks.logprobs(groups)))
    (plain, logprobs), (shared, _), _ = found
    assert plain["step/micro_batches_per_rank"] < shared["step/micro_batches_per_rank"]
    assert plain["step_control/kept"] < 1
    numbers = [
        name for name, value in plain.items() if isinstance(value, float) and name.startswith(("step", "policy"))
    ]
    assert {"step/grad_norm", "step_control/kept", "policy/entropy"} <= set(numbers)
    for metrics, logprobs_again in found[1:]:
        for name in set(numbers) - {"step/micro_batches_per_rank"}:
            assert metrics[name] == pytest.approx(plain[name], rel=1e-3, abs=1e-6), name
        for cell, values in logprobs.items():
            np.testing.assert_allclose(logprobs_again[cell], values, atol=2e-3)
