"""What can be known before Ray starts is known by `validate` and `train` alike, all of it at once."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quatro_ray.config import GeneratorConfig, TinyModelConfig, engine_args
from quatro_ray.engines.engine_args import gpu_args, problems_of
from quatro_ray.engines.tiny_model import make_model, save_pretrained
from quatro_ray.engines.tiny_tokenizer import make_tokenizer
from quatro_ray.engines.weight_files import check_weights, num_weights
from quatro_ray.errors import ConfigError
from quatro_ray.jobs.preflight import check
from quatro_ray.orchestrator import host
from quatro_ray.orchestrator.host import check_host
from quatro_ray.orchestrator.resources import (
    bundles,
    describe,
    learner_bytes_per_rank,
    num_adapter_parameters,
    weight_bytes_per_device,
)
from tests.make import config


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained model with 4 attention heads and 2 key-value heads."""
    path = tmp_path_factory.mktemp("made") / "model"
    tokenizer = make_tokenizer()
    save_pretrained(
        make_model(TinyModelConfig(kind="tiny", hidden_size=128, num_heads=4), tokenizer, 0), tokenizer, path
    )
    return path


@pytest.fixture
def folder(tmp_path: Path, made: Path) -> Path:
    """A copy of the model, which a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "model"))


def change(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def pretrained(tmp_path: Path, path: Path | str, **over: Any) -> Any:
    return config(tmp_path / "run", **{"model": {"kind": "pretrained", "path": str(path)}} | over)


def problems(tmp_path: Path, path: Path | str, **over: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        check(pretrained(tmp_path, path, **over))
    return str(caught.value)


def test_all_problems_are_told_at_once(tmp_path: Path, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    text = problems(
        tmp_path,
        folder,
        run={"dir": "/proc/x", "num_steps": 1},
        generator={"max_prompt_tokens": 16, "max_response_tokens": 8, "tensor_parallel_size": 3, "kv_cache_gib": 50_000}
        | {"dtype": "float32"},
        data={
            "train": {"mine": {"kind": "jsonl", "path": "/nowhere.jsonl"}},
            "eval": {"sums": {"kind": "chain_sum", "num_questions": 16, "seed": 1}},
        },
        telemetry={"callbacks": ["nowhere:callback"]},
    )
    first, *lines = text.splitlines()
    assert first == "6 problems"
    for line, expected in zip(
        sorted(lines),
        [
            "/nowhere.jsonl: cannot be read",
            "generator.kv_cache_gib=50000: ",
            "generator.tensor_parallel_size=3: must divide the model's 4 attention heads",
            f"model.path={folder}: has no weights",
            "run.dir=/proc/x, checkpoint.dir=/proc/x/checkpoints: cannot be used",
            "telemetry.callbacks='nowhere:callback': importing it failed: ModuleNotFoundError",
        ],
        strict=True,
    ):
        assert expected in line
    assert not (tmp_path / "run").exists()


@pytest.mark.process
def test_the_users_own_objective_is_called_once_before_anything_starts(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "mine.py").write_text("def loss(batch):\n    print('hello')\n    return batch.advantage.sum()\n")
    text = problems(tmp_path, folder, objective={"kind": "user", "loss": f"{tmp_path}/mine.py:loss"})
    assert text.startswith(f"objective.loss='{tmp_path}/mine.py:loss' returned a tensor [] of float32")
    assert "\n" not in text


@pytest.mark.process
def test_a_good_one_passes_and_leaves_no_trace(tmp_path: Path, folder: Path) -> None:
    change(folder, bos_token_id=0)
    prepared = check(pretrained(tmp_path, folder))
    assert prepared.dataset.train["sums"]
    (note,) = prepared.notes
    assert note.startswith("tokenizer: prompts do not begin with '<pad>', the BOS token of the model's configuration")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("path", ["/nowhere", "./nowhere", "a/b/c", "~/nowhere"])
def test_a_folder_that_is_missing_is_one_problem(tmp_path: Path, path: str) -> None:
    assert problems(tmp_path, path).startswith(f"model.path={path}: cannot be loaded (there is no such folder)")


def test_a_folder_without_a_tokenizer(tmp_path: Path, folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()
    assert "has no tokenizer (its vocabulary has 1 tokens); copy" in problems(tmp_path, folder)


def test_damaged_and_missing_weights(folder: Path) -> None:
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(7)}, folder / "model.safetensors")
    whole = (folder / "model.safetensors").read_bytes()
    for content, expected in ((whole[:-1], "bytes, and its header says"), (b"", "is not a safetensors file")):
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(ConfigError, match=expected):
            check_weights(folder)
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    (folder / "one.safetensors").write_bytes(whole)
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"its index lists two\.safetensors, which is missing"):
        check_weights(folder)
    assert num_weights(folder) == 22


def test_heads_that_several_devices_cannot_share(tmp_path: Path, folder: Path) -> None:
    change(folder, num_attention_heads=12, num_key_value_heads=6)
    over = {"generator": {"max_prompt_tokens": 16, "max_response_tokens": 8, "tensor_parallel_size": 4}}
    assert "must divide the model's 6 key-value heads, or be a multiple" in problems(tmp_path, folder, **over)


def test_layers_that_several_stages_cannot_share(tmp_path: Path, folder: Path) -> None:
    over = {"generator": {"max_prompt_tokens": 16, "max_response_tokens": 8, "pipeline_parallel_size": 8}}
    assert "pipeline_parallel_size=8: must be at most the model's 2 layers" in problems(tmp_path, folder, **over)


def test_an_engine_reserves_a_device_for_each_worker_of_each_copy(tmp_path: Path) -> None:
    sizes = {"tensor_parallel_size": 2, "pipeline_parallel_size": 3, "data_parallel_size": 4}
    planned = bundles(config(tmp_path, cluster={"device": "cuda"}, generator=sizes))
    assert [b.resources["GPU"] for b in planned if b.role == "generator"] == [24]
    per_device = weight_bytes_per_device(config(tmp_path, generator=sizes), 600)
    assert per_device == 400  # float32, and each copy has all weights


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_plan_counts_weights_by_their_headers(tmp_path: Path, folder: Path, kind: str) -> None:
    save_file({"a": torch.zeros(377_472, dtype=getattr(torch, kind))}, folder / "model.safetensors")
    lines = describe(pretrained(tmp_path, folder)).splitlines()
    assert "  377,472 parameters" in lines
    assert "  engine: 0.001 GiB of host memory a device while it receives new weights" in lines


def test_plan_counts_the_buffers_of_a_transfer_on_gpus(tmp_path: Path) -> None:
    lines = describe(config(tmp_path, cluster={"device": "cuda"}, weight_sync={"buffer_mib": 128}))
    assert "learner rank 0, and each device of an engine: 0.250 GiB of buffers during a weight update" in lines
    assert "buffers" not in describe(config(tmp_path))  # gloo's are in host memory


def test_plan_counts_the_states_of_adapters_alone(tmp_path: Path, folder: Path) -> None:
    learner: dict[str, Any] = {"num_ranks": 2, "learning_rate": 1e-3, "tokens_per_micro_batch": 64, "dtype": "bfloat16"}
    adapted = learner | {"lora": {"rank": 8}, "reference_kl_coef": 0.1}
    for model in ({"kind": "pretrained", "path": str(folder)}, {"kind": "tiny", "hidden_size": 128, "num_heads": 4}):
        made = config(tmp_path, model=model, learner=adapted)
        # two layers of width 128, key-value heads of 64 together, and an MLP of 512
        num_adapter = 8 * 2 * (2 * 256 + 2 * 192 + 3 * 640)
        assert num_adapter_parameters(made) == num_adapter
        # weights in bfloat16; of adapters float32 gradients, master copies, moments and the weights before the step
        assert learner_bytes_per_rank(made, 1_000_000) == (2 * (1_000_000 + num_adapter) + 20 * num_adapter) // 2
        assert f"frozen; {num_adapter:,} in adapters" in describe(made)
    some = config(tmp_path, model=model, learner=learner | {"lora": {"rank": 8, "target_modules": ["v_proj"]}})
    assert num_adapter_parameters(some) == 8 * 2 * 192
    hub = {"kind": "pretrained", "path": "someone/a-model", "num_parameters": 1000}
    assert "  1,000 parameters, frozen; adapters unknown" in describe(config(tmp_path, model=hub, learner=adapted))
    whole = config(tmp_path, model=model, learner=learner)
    assert num_adapter_parameters(whole) is None
    assert learner_bytes_per_rank(whole, 1_000_000) == 22 * 1_000_000 // 2


def test_devices_and_memory_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    wanted = config(tmp_path, cluster={"cpus_per_engine": 999}, generator={"kv_cache_gib": 50_000})
    with pytest.raises(ConfigError, match=r"needs 1\S* CPUs and the cluster has .*; generator.kv_cache_gib=50000: "):
        check_host(wanted)
    check_host(config(tmp_path, cluster={"cpus_per_engine": 999, "address": "far:6379"}))
    monkeypatch.setenv("RAY_ADDRESS", "far:6379")
    check_host(wanted)


def test_a_machine_without_the_library_that_vllm_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_NUMA", "libnowhere.so.1")
    with pytest.raises(
        ConfigError, match=r"^vLLM on CPU needs libnowhere\.so\.1, .*: install it \(Debian: apt install"
    ):
        check_host(config(tmp_path))
    check_host(config(tmp_path, cluster={"address": "far:6379"}))  # its nodes are elsewhere


def test_a_machine_without_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError, match=r"the cluster has 0, .*: set cluster\.address .*, or cluster\.device=cpu"):
        check_host(config(tmp_path, cluster={"device": "cuda"}))


def test_vllm_in_its_build_for_gpus_cannot_run_on_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)  # before the build that is installed
    for build, is_for_cpu in (("0.32.0", False), ("0.32.0+cpu", True)):
        info = tmp_path / "vllm-0.32.0.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {build}\n")
        refused = pytest.raises(
            ConfigError, match=r"^cluster\.device=cpu: vLLM 0\.32\.0 is installed in its build for GPUs"
        )
        with nullcontext() if is_for_cpu else refused:
            check_host(config(tmp_path))


@pytest.mark.process
def test_engine_arguments_are_read_by_vllms_own_parser(tmp_path: Path, folder: Path) -> None:
    given = {"max_num_batchd_tokens": 64, "kv_cache_dtype": "fp9", "enforce_eager": "yes", "block_size": 16}
    sampling = {"max_prompt_tokens": 16, "max_response_tokens": 8}
    text = problems(tmp_path, folder, generator=sampling | {"engine_args": given})
    assert (
        "generator.engine_args.max_num_batchd_tokens: vLLM's AsyncEngineArgs has no such field; "
        "did you mean max_num_batched_tokens?"
    ) in text
    assert "generator.engine_args.kv_cache_dtype='fp9': vLLM refuses it (invalid choice: 'fp9'" in text
    assert "generator.engine_args.enforce_eager='yes': vLLM refuses it (must be true or false)" in text
    assert "block_size" not in text
    good = {"max_num_batched_tokens": 64, "enforce_eager": True, "enable_chunked_prefill": False, "quantization": None}
    assert problems_of(good | {"compilation_config": {"cudagraph_capture_sizes": [1, 2]}}) == []


def test_engines_on_gpus_get_a_cache_by_share_or_by_size() -> None:
    def given(**settings: object) -> dict[str, object]:
        return gpu_args(GeneratorConfig(max_prompt_tokens=4, max_response_tokens=4, **settings))

    assert given() == {"max_num_batched_tokens": 8192, "gpu_memory_utilization": 0.85}
    sized = given(kv_cache_gib=1.5, max_num_batched_tokens=4096)
    assert sized == given() | {"max_num_batched_tokens": 4096, "kv_cache_memory_bytes": 1610612736}


def test_every_argument_that_is_refused_is_one_of_vllms() -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    names = {field.name for field in fields(AsyncEngineArgs)}
    assert set().union(*engine_args._REASONS.values()) <= names
    assert any(name.startswith("data_parallel_") for name in names)
