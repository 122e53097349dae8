"""Two ranks load a model: its shards are the weights of the files, and no rank ever holds the whole model."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from benchmarks.models import make
from quatro_ray.engines.policy_loading import load_policy
from quatro_ray.errors import ConfigError
from tests.real.ranks import on_two_ranks

ZERO_CONFIG = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
MODELS = ["Qwen2", "GPT-2", "Mixtral", "Qwen2-MoE", "DeepSeek-V3", "Gemma 3 (text)", "LFM2"]


def load(path: Path, **settings: Any) -> Any:
    dtype = {"dtype": torch.float32} | settings
    policy, _ = load_policy(str(path), attn_implementation="auto", temperature=1.0, chunk_tokens=64, **dtype)
    return policy


def dtypes(folder: Path) -> set[str]:
    """Those of the parameters of a model that names float32 for some of them, in a run in bfloat16."""
    policy = load(folder, zero_config=ZERO_CONFIG | {"bf16": {"enabled": True}}, dtype=torch.bfloat16)
    return {str(parameter.dtype) for parameter in policy.parameters()}


def test_all_parameters_have_the_dtype_of_the_run(tmp_path: Path) -> None:
    model = make("Bamba")
    model.save_pretrained(tmp_path)
    assert on_two_ranks(dtypes, tmp_path) == [{"torch.bfloat16"}] * 2


def differing_tensors(folder: Path) -> dict[str, list[str]]:
    """Parameters and buffers, by architecture, that are not what transformers loads."""
    from deepspeed import zero

    found: dict[str, list[str]] = {}
    for name in MODELS:
        whole, sharded = load(folder / name), load(folder / name, zero_config=ZERO_CONFIG)
        tensors = dict(sharded.named_buffers()) | dict(sharded.named_parameters())
        expected = dict(whole.named_buffers()) | dict(whole.named_parameters())
        assert tensors.keys() == expected.keys()
        with zero.GatheredParameters(list(sharded.parameters())):
            found[name] = [
                key
                for key, tensor in tensors.items()
                if tensor.dtype != expected[key].dtype or not torch.equal(tensor, expected[key])
            ]
    return found


def test_shards_are_the_weights_of_the_files(tmp_path: Path) -> None:
    """Experts that are several tensors on disk and one in memory, tied heads, and buffers among them."""
    for name in MODELS:
        make(name).save_pretrained(tmp_path / name, max_shard_size="40KB")
    assert len(list((tmp_path / "Mixtral").glob("*.safetensors"))) > 2
    assert on_two_ranks(differing_tensors, tmp_path) == [{name: [] for name in MODELS}] * 2


class PeakMemory:
    """Largest anonymous memory of this process since the start of the `with` block, over that at the start, bytes."""

    def __enter__(self) -> PeakMemory:
        self._start = self.peak = self._now()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.is_set():
            self.peak = max(self.peak, self._now())
            time.sleep(0.002)

    def _now(self) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.peak -= self._start


def peaks(folder: Path) -> tuple[int, int, int]:
    """Bytes of the model, and peaks of loading it sharded and whole."""
    load(folder / "Qwen2", zero_config=ZERO_CONFIG)  # what is imported and allocated once
    with PeakMemory() as sharded:
        policy = load(folder / "large", zero_config=ZERO_CONFIG)
    size = sum(4 * parameter.ds_numel for parameter in policy.parameters())
    del policy
    with PeakMemory() as whole:
        load(folder / "large")
    return size, sharded.peak, whole.peak


def test_no_rank_ever_holds_the_whole_model(tmp_path: Path) -> None:
    make("Qwen2").save_pretrained(tmp_path / "Qwen2")
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 20, "num_attention_heads": 8}
    config = transformers.Qwen2Config(vocab_size=512, num_key_value_heads=4, **shape)
    transformers.Qwen2ForCausalLM(config).bfloat16().save_pretrained(tmp_path / "large", max_shard_size="64MB")
    for size, sharded, whole in on_two_ranks(peaks, tmp_path):
        assert whole >= 0.95 * size  # the measurement sees a whole model
        assert sharded <= 0.7 * size


def refusal(folder: Path) -> str:
    with pytest.raises(ConfigError) as raised:
        load(folder, zero_config=ZERO_CONFIG)
    return str(raised.value)


def test_weights_that_no_file_has_are_named_on_every_rank(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make("Qwen2").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for line in on_two_ranks(refusal, tmp_path):
        assert "its files have no weights for model.layers.1.mlp.up_proj.weight; give a folder" in line
