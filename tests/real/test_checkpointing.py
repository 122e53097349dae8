"""A learner that is saved and loaded goes on as if nothing had happened; with another number of ranks, from there."""

from __future__ import annotations

import random
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from pydantic import TypeAdapter
from ray.exceptions import RayTaskError

from quatro_ray.actors.base import use_interface_of
from quatro_ray.config import LearnerConfig, ObjectiveConfig
from quatro_ray.engines.learner_spec import LearnerSpec
from quatro_ray.errors import CheckpointError
from quatro_ray.replay.packing import pack
from quatro_ray.replay.staleness import Lineage
from quatro_ray.types import Outcome, Query, Rollout, RolloutGroup, Score, VersionSpan

NUM_QUERIES, GROUP_SIZE = 4, 4
NUM_STEPS = 3
"""Before the checkpoint, and after it."""

State = dict[str, dict[str, torch.Tensor]]
"""By parameter: its weight as it is read, its fp32 master and both moments, whole."""


@ray.remote
class RankActor:
    """A LearningEngine and a look into it."""

    def __init__(self, model_path: str, config: LearnerConfig, rank: int, sub_group_size: int | None) -> None:
        from quatro_ray.engines.learning import LearningEngine

        class Engine(LearningEngine):
            def _deepspeed_config(self) -> dict[str, Any]:
                made = super()._deepspeed_config()
                if sub_group_size is not None:
                    made["zero_optimization"]["sub_group_size"] = sub_group_size
                return made

        use_interface_of(ray.util.get_node_ip_address())
        self._config = config
        spec = LearnerSpec(
            model_path=model_path,
            config=config,
            objective=TypeAdapter(ObjectiveConfig).validate_python({"kind": "quatro"}),
            device="cpu",
            temperature=1.0,
            max_response_tokens=9,
            seed=0,
            num_steps=2 * NUM_STEPS + 1,
        )
        self._engine = Engine(spec, rank=rank)

    def meeting_point(self) -> tuple[str, int]:
        with socket.socket() as s:
            s.bind(("", 0))
            return ray.util.get_node_ip_address(), int(s.getsockname()[1])

    def start(self, address: str, port: int) -> None:
        self._engine.start(address, port)

    def train(self, steps: range) -> list[dict[str, Any]]:
        """The metrics of each step; the data of step k is always the same."""
        return [self._engine.train_step(self._batch(k), self._engine.version) for k in steps]

    def _batch(self, step: int) -> Any:
        limit = self._config.tokens_per_micro_batch
        return pack(
            groups(step),
            Lineage.unbroken(step),
            num_ranks=self._config.num_ranks,
            rank=self._engine.row_rank,
            tokens_per_micro_batch=limit,
        )

    def save(self, folder: Path) -> None:
        self._engine.save_checkpoint(folder)

    def load(self, folder: Path, version: int | None = None) -> int:
        self._engine.load_checkpoint(folder, version)
        return self._engine.version

    def state(self) -> tuple[State, list[float], float]:
        """The state of all ranks together, this rank's step counter of each sub-group, and the learning rate."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        found: State = {name: {"weight": tensor.clone()} for name, tensor in self._engine.weights}
        for name, parameter in self._engine._loaded.policy.parameters_by_name().items():
            found[name]["fp32"] = safe_get_full_fp32_param(parameter).clone()
            for key in ("exp_avg", "exp_avg_sq"):
                found[name][key] = safe_get_full_optimizer_state(parameter, key).clone()
        optimizer = self._engine._loaded.engine.optimizer
        steps = [float(s["step"]) for s in optimizer.optimizer.state.values()]
        return found, steps, optimizer.param_groups[0]["lr"]

    def draw(self, count: int) -> list[float]:
        """Random numbers of every kind that a rank may draw, `count` times."""
        for _ in range(count):
            # an odd number of normal ones: both generators keep the second of a pair
            drawn = [random.random(), random.gauss(), np.random.standard_normal(), float(torch.randn(1))]
        return drawn


def groups(step: int) -> tuple[RolloutGroup, ...]:
    rng = np.random.default_rng(step)

    def one() -> Rollout:
        tokens = rng.integers(2, 200, int(rng.integers(2, 9))).astype(np.int32)
        logprobs = np.full(len(tokens), -5.3, np.float32)  # about those of a model with random weights
        score = Score(float(rng.integers(0, 2)), Outcome.OK, "")
        return Rollout(tokens, logprobs, (VersionSpan(0, 0, len(tokens)),), "", "stop", score)

    prompt = np.arange(5, 9, dtype=np.int32)
    return tuple(
        RolloutGroup(q, Query(str(q), "x", "y"), prompt, tuple(one() for _ in range(GROUP_SIZE)))
        for q in range(NUM_QUERIES)
    )


class Ranks:
    def __init__(self, actors: list[Any]) -> None:
        self.actors = actors

    def call(self, method: str, *args: Any) -> list[Any]:
        return ray.get([getattr(a, method).remote(*args) for a in self.actors], timeout=120)

    def train(self, steps: range) -> list[dict[str, Any]]:
        return self.call("train", steps)[0]

    def state(self) -> tuple[State, list[float], float]:
        return self.call("state")[0]


@contextmanager
def ranks(model_path: str, count: int, sub_group_size: int | None = None, **settings: Any) -> Iterator[Ranks]:
    limits = {"window_kl_nats_per_token": 0.01, "max_kl_nats_per_token": 1e-3, "probe_share": 1.0}
    fields: dict[str, Any] = {
        "num_ranks": count,
        "learning_rate": 1e-2,
        "dtype": "float32",
        "tokens_per_micro_batch": 64,
        "schedule": "cosine",
        "num_warmup_steps": 2,
        "weight_decay": 0.01,
        "reference_kl_coef": 0.1,
        "step_control": limits,
    }
    config = LearnerConfig.model_validate(fields | settings)
    env = {"env_vars": {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}}
    made = RankActor.options(num_cpus=0.25, runtime_env=env)  # type: ignore[attr-defined]
    actors = [made.remote(model_path, config, rank, sub_group_size) for rank in range(count)]
    try:
        address, port = ray.get(actors[0].meeting_point.remote(), timeout=300)
        ray.get([a.start.remote(address, port) for a in actors], timeout=240)
        yield Ranks(actors)
    finally:
        for actor in actors:
            ray.kill(actor)


def assert_same(one: State, other: State) -> None:
    assert one.keys() == other.keys() and one
    for name in one:
        for key in one[name]:
            assert torch.equal(one[name][key], other[name][key]), f"{key} of {name}"


BEFORE, AFTER = range(NUM_STEPS), range(NUM_STEPS, 2 * NUM_STEPS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_goes_on_bit_for_bit(local_ray: None, model_path: str, tmp_path: Path, dtype: str) -> None:
    """And one rank alone finds the same weights, moments, counter and learning rate there."""
    folder, start = tmp_path / "checkpoints" / "step_3", tmp_path / "checkpoints" / "step_0"
    with ranks(model_path, 2, dtype=dtype) as first:
        first.call("save", start)
        metrics = first.train(range(2 * NUM_STEPS))
        assert [m["step_control/acted"] for m in metrics[1:]] == [1.0] * (2 * NUM_STEPS - 1)
        assert len({m["step/learning_rate"] for m in metrics}) == 2 * NUM_STEPS
        assert metrics[NUM_STEPS]["policy/reference_kl"] > 0
        whole = first.state()

        # the same once more in the same processes, with a save half way
        first.call("load", start)
        before = first.train(BEFORE)
        for number, actor in enumerate(first.actors):
            ray.get(actor.draw.remote(number + 1))  # so that the ranks differ
        first.call("save", folder)
        saved, drawn = first.state(), first.call("draw", 1)
        assert drawn[0] != drawn[1]
        after_save = first.train(AFTER)
        assert_same(first.state()[0], whole[0])
    with ranks(model_path, 2, dtype=dtype) as second:
        # under a number that was not given before, as after a roll-back
        assert second.call("load", folder, 7) == [7, 7]
        assert second.call("load", folder) == [NUM_STEPS, NUM_STEPS]
        assert second.call("draw", 1) == drawn
        assert_same(second.state()[0], saved[0])
        resumed = second.train(AFTER)
        state = second.state()
    assert_same(state[0], whole[0])
    assert state[1:] == whole[1:]
    with ranks(model_path, 1, dtype=dtype) as alone:
        alone.call("load", folder)
        assert_same(alone.state()[0], saved[0])
        assert alone.state()[1:] == saved[1:]
    assert before == metrics[:NUM_STEPS]
    assert after_save == resumed == metrics[NUM_STEPS:]


@dataclass
class Saved:
    """What two ranks saved in `folder`, the state then and one step later, and the ranks, which go on living."""

    folder: Path
    ranks: Ranks
    state: tuple[State, list[float], float]
    next_metrics: dict[str, Any]
    next_state: State


SUB_GROUP_SIZE = 20_000
"""So that the shards lie in several flat tensors, as those of large models do."""


@pytest.fixture(scope="module")
def saved(local_ray: None, model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saved]:
    folder = tmp_path_factory.mktemp("checkpoints") / "step_3"
    with ranks(model_path, 2, SUB_GROUP_SIZE) as made:
        made.train(BEFORE)
        made.call("save", folder)
        state = made.state()
        assert len(state[1]) > 2
        (metrics,) = made.train(range(NUM_STEPS, NUM_STEPS + 1))
        yield Saved(folder, made, state, metrics, made.state()[0])


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_fewer_or_more_ranks_take_over(saved: Saved, model_path: str, num_ranks: int) -> None:
    with ranks(model_path, num_ranks, SUB_GROUP_SIZE) as made:
        assert made.call("load", saved.folder) == [NUM_STEPS] * num_ranks
        state, counters, learning_rate = made.state()
        assert_same(state, saved.state[0])
        assert set(counters) == set(saved.state[1])
        assert learning_rate == saved.state[2]
        assert [p.name for p in saved.folder.parent.iterdir() if p.is_dir()] == ["step_3"]

        (metrics,) = made.train(range(NUM_STEPS, NUM_STEPS + 1))
        after, stepped, _ = made.state()
    # each sub-group has its own counter
    assert set(stepped) == {saved.state[1][0] + 1}
    # the same step, but for the order in which gradients are added up
    for name in ("step/learning_rate", "step/grad_norm", "policy/reference_kl", "step_control/kept"):
        assert metrics[name] == pytest.approx(saved.next_metrics[name], rel=1e-2), name
    for name, tensors in after.items():
        assert torch.allclose(tensors["fp32"], saved.next_state[name]["fp32"], atol=1e-3), name


def test_what_is_no_checkpoint_is_refused_by_all_ranks(saved: Saved, tmp_path: Path) -> None:
    def refuse(folder: Path, reason: str) -> None:
        for load in [actor.load.remote(folder) for actor in saved.ranks.actors]:
            with pytest.raises(RayTaskError) as caught:
                ray.get(load, timeout=60)
            cause = caught.value.cause
            assert isinstance(cause, CheckpointError)
            assert f"checkpoint {folder}: {reason}" in str(cause) and "\n" not in str(cause)

    refuse(tmp_path / "nowhere", "there is no such folder")
    refuse(tmp_path, "it has no file")
    # one rank's shard is cut off
    cut = tmp_path / "cut"
    shutil.copytree(saved.folder, cut)
    shard = cut / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    shard.write_bytes(shard.read_bytes()[:-1000])
    refuse(cut, f"{shard.name} is missing or cut off")
    # a third rank's shards are not complete, so that nobody can convert
    (cut / "zero_pp_rank_2_mp_rank_00_model_states.pt").write_bytes(b"")
    refuse(cut, shard.name)
    # of another dtype
    other = tmp_path / "other"
    shutil.copytree(saved.folder, other)
    for path in other.glob("*optim*"):
        path.rename(path.with_name(f"bf16_{path.name}"))
    refuse(other, "it was saved with learner.dtype bfloat16")
    # nothing has been touched
    assert_same(saved.ranks.state()[0], saved.next_state)
    # what was saved is of another model
    foreign = tmp_path / "foreign"
    shutil.copytree(saved.folder, foreign)
    for path in foreign.glob("*model*"):
        content = torch.load(path, weights_only=False)
        content["module"]["stranger"] = torch.zeros(1)
        torch.save(content, path)
    refuse(foreign, "DeepSpeed refuses it")
    # and another number of ranks cannot convert it
    (foreign / "zero_pp_rank_1_mp_rank_00_model_states.pt").unlink()
    refuse(foreign, "DeepSpeed cannot convert it to another number of ranks")
    saved.ranks.call("load", saved.folder)
    assert_same(saved.ranks.state()[0], saved.state[0])
