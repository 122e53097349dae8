"""Bundles and placement groups, and the memory of a GPU that an engine and a rank share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from quatro_ray.cli import app
from quatro_ray.config import Config, PretrainedModelConfig, load_config
from quatro_ray.engines.model_shape import ModelShape
from quatro_ray.errors import ConfigError
from quatro_ray.orchestrator.device_memory import check_device_memory, device_memory, training_bytes
from quatro_ray.orchestrator.resources import SHARED_DEVICE, bundles, learner_bytes_per_rank, placement_groups
from tests.make import config

QWEN_05B = ModelShape(24, 896, 4864, 151_936), 494_032_768
QWEN_15B = ModelShape(28, 1536, 8960, 151_936), 1_543_714_304
QWEN_7B = ModelShape(28, 3584, 18_944, 152_064), 7_615_616_512
GPU: dict[str, dict[str, Any]] = {
    "cluster": {"device": "cuda", "colocate": True, "gpu_memory_gib": 24, "cpus_per_engine": 2, "cpus_per_rank": 1},
    "generator": {"num_engines": 2, "kv_cache_gib": 4, "max_prompt_tokens": 16, "max_response_tokens": 8},
}


def shared(**sections: dict[str, Any]) -> Config:
    merged = {name: GPU.get(name, {}) | sections.get(name, {}) for name in {**GPU, **sections}}
    return config("runs/test", **merged)


def test_an_engine_and_a_rank_take_a_gpu_together() -> None:
    plan = bundles(shared())
    assert [b for b in plan if b.role in ("generator", "learner")] == []
    devices = [b for b in plan if b.role == SHARED_DEVICE]
    assert [(b.index, b.resources) for b in devices] == [(i, {"CPU": 3.0, "GPU": 1.0}) for i in range(2)]
    assert devices[0].by_role() == {"generator": {"CPU": 2, "GPU": 0.5}, "learner": {"CPU": 1, "GPU": 0.5}}


def test_the_learner_has_one_placement_group_and_each_engine_its_own() -> None:
    """The largest comes first."""

    def roles(made: Config) -> list[list[str]]:
        return [[bundle.role for bundle in group] for group in placement_groups(bundles(made))]

    engines, learner, others = [["generator"]] * 3, ["learner"] * 2, ["verifier", "replay"]
    generator = {"num_engines": 3, "max_prompt_tokens": 1}
    assert roles(config(generator=generator)) == [learner, *engines, others]
    cluster = {"device": "cpu", "cpus_per_engine": 2, "cpus_per_rank": 0.4, "cpus_per_verifier": 0.05}
    assert roles(config(generator=generator, cluster=cluster)) == [*engines, learner, others]
    assert roles(shared()) == [[SHARED_DEVICE] * 2, others]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"cluster": {"gpu_memory_gib": None}}, "colocate=true needs gpu_memory_gib"),
        ({"cluster": {"colocate": False, "colocate_mode": "alternating"}}, "alternating needs colocate=true"),
        ({"generator": {"kv_cache_gib": None}}, "colocate=true needs generator.kv_cache_gib"),
        ({"generator": {"num_engines": 1}}, "as many engines as ranks, and generator.num_engines=1, max_engines=1"),
        ({"generator": {"max_engines": 3}}, "generator.num_engines=2, max_engines=3, learner.num_ranks=2"),
        ({"generator": {"tensor_parallel_size": 2}}, "needs engines of one device"),
        ({"weight_sync": {"backend": "nccl"}}, "NCCL refuses two processes on one GPU"),
        ({"cluster": {"colocate": False}, "weight_sync": {"backend": "ipc"}}, "ipc needs cluster.colocate=true"),
        ({"cluster": {"device": "cpu"}, "weight_sync": {"backend": "ipc"}}, "ipc needs cluster.device=cuda"),
    ],
)
def test_what_cannot_share_a_device_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        shared(**changes)


def test_weights_travel_inside_the_gpu_unless_told_otherwise() -> None:
    assert shared().sync_backend == "ipc"
    assert shared(weight_sync={"backend": "gloo"}).sync_backend == "gloo"
    assert (
        config(cluster={"colocate": True}, generator={"num_engines": 2, "max_prompt_tokens": 1}).sync_backend == "gloo"
    )


@pytest.mark.parametrize(
    ("model", "tokens", "measured_gib"), [(QWEN_05B, 8192, 22.5), (QWEN_05B, 2304, 13.9), (QWEN_15B, 8192, 49.5)]
)
def test_the_estimate_for_a_rank_is_near_what_an_h100_took(
    model: tuple[ModelShape, int], tokens: int, measured_gib: float
) -> None:
    """docs/results.md: whole activations, step control, chunks of 1,024."""
    shape, parameters = model
    made = config(learner={"num_ranks": 1, "dtype": "bfloat16", "tokens_per_micro_batch": tokens})
    estimate = (learner_bytes_per_rank(made, parameters) + training_bytes(made, shape)) / 2**30
    assert measured_gib <= estimate <= 1.25 * measured_gib


def tiny(**cluster: Any) -> Config:
    learner = {"num_ranks": 2, "dtype": "bfloat16", "tokens_per_micro_batch": 64}
    return shared(cluster=GPU["cluster"] | cluster, learner=learner)


def test_the_engine_has_a_fixed_part_and_the_rank_the_rest() -> None:
    plan = device_memory(tiny())
    assert plan.engine == pytest.approx(6.5, abs=0.01) and plan.engine_asleep == plan.engine
    assert plan.engine_share + plan.rank_share == pytest.approx(1 - 0.5 / 24)  # a rank's CUDA context
    turns = device_memory(tiny(colocate_mode="alternating"))
    assert turns.rank_share > plan.rank_share and turns.engine_share == plan.engine_share
    assert turns.need < plan.need


def test_what_does_not_fit_is_refused_before_anything_starts() -> None:
    check_device_memory(tiny())
    with pytest.raises(ConfigError, match=r"cluster.gpu_memory_gib=6: engine and rank need 7\.\d GiB .* lower "):
        check_device_memory(tiny(gpu_memory_gib=6))


def test_the_remedies_are_those_that_the_configuration_lacks() -> None:
    with pytest.raises(ConfigError, match=r"set learner\.\S+ or .*colocate_mode=alternating, or take a smaller model"):
        check_device_memory(tiny(gpu_memory_gib=6))
    with pytest.raises(ConfigError) as refused:
        check_device_memory(tiny(gpu_memory_gib=3, colocate_mode="alternating"))
    assert "colocate_mode=alternating" not in str(refused.value)


@pytest.mark.parametrize(
    ("model", "changes", "need_gib"),
    [
        (QWEN_15B, {"gpu_memory_gib": 22, "kv_cache_gib": 4, "tokens_per_micro_batch": 8192}, 17),
        (QWEN_7B, {"num_parameters": 7_615_616_512}, 61),
    ],
)
def test_larger_models_fit_with_adapters(
    model: tuple[ModelShape, int], changes: dict[str, int], need_gib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands of docs/deployment.md."""
    monkeypatch.setattr("quatro_ray.orchestrator.device_memory.model_shape", lambda config: model[0])
    sections = {"gpu_memory_gib": "cluster", "kv_cache_gib": "generator", "num_parameters": "model"}
    overrides = [f"{sections.get(name, 'learner')}.{name}={value}" for name, value in changes.items()]
    made = load_config(Path("configs/qwen2.5-1.5b-1gpu.yaml"), ["learner.lora.rank=16", *overrides])
    assert round(device_memory(made).need) == need_gib
    check_device_memory(made)


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*-1gpu.yaml")), ids=lambda path: path.name)
def test_plan_shows_how_the_examples_divide_their_gpu(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, parameters = {"0.5b": QWEN_05B, "1.5b": QWEN_15B}[path.name.split("-")[1]]
    monkeypatch.setattr("quatro_ray.orchestrator.device_memory.model_shape", lambda config: shape)
    made = load_config(path)
    assert isinstance(made.model, PretrainedModelConfig) and made.model.num_parameters == parameters
    check_device_memory(made)
    shown = CliRunner().invoke(app, ["plan", str(path)])
    assert shown.exit_code == 0
    plan = device_memory(made)
    assert f"a shared GPU: engine {plan.engine:.1f} GiB" in shown.output
    assert f"at most {plan.need:.1f} of {plan.total:g} GiB at a time" in shown.output
