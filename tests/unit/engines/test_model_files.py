"""What is written is what transformers writes: names, layout, and every file but the weights as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.models import make
from quatro_ray.engines.model_files import check_files, write_model
from quatro_ray.engines.policy import PolicyModel, as_on_disk, persistent_buffers
from quatro_ray.engines.tiny_tokenizer import make_tokenizer
from quatro_ray.errors import ConfigError

CONVERTED = ["Mixtral", "Qwen2-MoE", "Qwen3-MoE", "OLMoE", "DeepSeek-V3", "Jamba", "Nemotron-H", "GPT-NeoX"]
PLAIN = ["Qwen2", "Phi", "LFM2", "GPT-2"]


def source_of(name: str, path: Path) -> PreTrainedModel:
    """Write a tiny model with all its files, and load it as the learner does."""
    make(name).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    (path / "generation_config.json").write_text(
        json.dumps({"do_sample": False, "temperature": 0.9, "top_p": 0.6, "eos_token_id": [2, 3]})
    )
    (path / "chat_template.jinja").write_text("{{ messages }}")
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path)
    return model


def write(model: PreTrainedModel, source: Path, path: Path) -> None:
    policy = PolicyModel(model, temperature=1.0, chunk_tokens=32)
    parameters = {name: p.detach() for name, p in policy.parameters_by_name().items()}
    write_model(path, as_on_disk(model, parameters) | as_on_disk(model, persistent_buffers(model)), source)


@pytest.mark.parametrize("name", [*CONVERTED, *PLAIN])
def test_names_and_tensors_are_those_of_save_pretrained(name: str, tmp_path: Path) -> None:
    model = source_of(name, tmp_path / "source")
    write(model, tmp_path / "source", tmp_path / "written")
    expected, found = (load_file(tmp_path / p / "model.safetensors") for p in ("source", "written"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n]) for n in expected)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "written")
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        original = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
        torch.testing.assert_close(loaded(ids).logits, original(ids).logits)


@pytest.mark.parametrize("name", [*CONVERTED, *PLAIN])
def test_names_and_shapes_are_known_without_weights(name: str, tmp_path: Path) -> None:
    model = source_of(name, tmp_path)
    parameters = dict(model.named_parameters())
    real = as_on_disk(model, {n: p.detach() for n, p in parameters.items()})
    meta = as_on_disk(model, {n: torch.empty_like(p, device="meta") for n, p in parameters.items()})
    assert {n: (t.shape, t.dtype) for n, t in meta.items()} == {n: (t.shape, t.dtype) for n, t in real.items()}


def test_every_other_file_is_copied_as_it_is(tmp_path: Path) -> None:
    """Even a generation configuration that transformers would refuse to save."""
    source, written = tmp_path / "source", tmp_path / "written"
    model = source_of("Qwen2", source)
    (source / "pytorch_model.bin").write_bytes(b"old weights")
    write(model, source, written)
    names = {p.name for p in source.iterdir()} - {"pytorch_model.bin"}
    assert {p.name for p in written.iterdir()} == names
    for name in names - {"model.safetensors", "config.json"}:
        assert (written / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((written / "generation_config.json").read_text())["eos_token_id"] == [2, 3]


def test_the_configuration_names_the_dtype_of_the_weights(tmp_path: Path) -> None:
    source, written = tmp_path / "source", tmp_path / "written"
    model = source_of("Qwen2", source).to(torch.bfloat16)
    write(model, source, written)
    assert AutoModelForCausalLM.from_pretrained(written).dtype == torch.bfloat16


def test_files_that_cannot_be_copied_are_told_before_a_step(tmp_path: Path) -> None:
    source_of("Qwen2", tmp_path)
    check_files(tmp_path)
    (tmp_path / "config.json").write_text("[1, 2]")
    with pytest.raises(ConfigError, match=r"model\.path=.*: its files cannot be copied, .*; correct them"):
        check_files(tmp_path)
