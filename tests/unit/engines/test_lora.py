"""Adapters: which layers get one, how they are merged, their names in files, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from benchmarks.models import make
from quatro_ray.config import LoraConfig
from quatro_ray.engines.lora import Adapters, is_adapter, peft_names
from quatro_ray.engines.policy import PolicyModel, as_on_disk
from quatro_ray.engines.policy_loading import load_policy
from quatro_ray.errors import ConfigError

LORA = LoraConfig(rank=4, alpha=8)


def with_random_adapters(name: str, lora: LoraConfig = LORA) -> tuple[Any, Adapters]:
    model = make(name).eval()
    adapters = Adapters(model, lora)
    with adapters.measured():
        pass
    return model, adapters


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(20)[None]).logits[0]


@pytest.mark.parametrize("name", ["Qwen2", "GPT-2", "Mixtral"])
def test_merged_weights_are_what_the_adapters_compute(name: str, tmp_path: Path) -> None:
    """Weights that lie transposed, square ones among them, and experts, which have no adapters, included."""
    model, adapters = with_random_adapters(name)
    plain = make(name).eval()
    merged = adapters.merge(model.state_dict())
    assert merged.keys() == plain.state_dict().keys()
    assert any(not torch.equal(tensor, plain.state_dict()[key]) for key, tensor in merged.items())
    plain.load_state_dict(merged)
    torch.testing.assert_close(logits(plain), logits(model), atol=1e-5, rtol=1e-4)
    with adapters.off():
        torch.testing.assert_close(logits(make(name).eval()), logits(model), atol=0, rtol=0)
    on_disk = as_on_disk(model, adapters.merge({key: tensor.to("meta") for key, tensor in model.state_dict().items()}))
    assert on_disk.keys() == as_on_disk(plain, plain.state_dict()).keys()


def test_the_sum_is_made_in_float32_and_rounded_once() -> None:
    model = make("Qwen2").bfloat16()
    adapters = Adapters(model, LORA)
    layer = "model.layers.1.mlp.up_proj"
    weight, a, b = torch.randn(256, 128).bfloat16(), torch.randn(4, 128).bfloat16(), torch.randn(256, 4).bfloat16()
    names = [f"{layer}.base_layer.weight", f"{layer}.lora_A.default.weight", f"{layer}.lora_B.default.weight"]
    norm = torch.ones(128).bfloat16()
    merged = adapters.merge(dict(zip(names, (weight, a, b), strict=True)) | {"model.layers.1.norm.weight": norm})
    exact = (weight.double() + 2 * (b.double() @ a.double())).bfloat16()
    assert (merged[f"{layer}.weight"] != exact).float().mean() < 1e-3
    assert merged["model.layers.1.norm.weight"] is norm and len(merged) == 2


@pytest.mark.parametrize(("rslora", "scale"), [(False, 2.0), (True, 4.0)])
def test_the_factor_is_that_of_peft(rslora: bool, scale: float) -> None:
    lora = LoraConfig(rank=4, alpha=8, use_rslora=rslora)
    _, adapters = with_random_adapters("Qwen2", lora)
    assert lora.scale == scale
    assert {layer.scaling["default"] for layer in adapters._layers.values()} == {scale}


def test_names_choose_layers_by_their_ends() -> None:
    chosen = {
        targets: set(Adapters(make("Qwen2"), LoraConfig(rank=2, target_modules=targets))._layers)
        for targets in (("q_proj", "v_proj"), ("layers.1.mlp.up_proj",), ("1.self_attn.q_proj",))
    }
    assert [len(names) for names in chosen.values()] == [4, 1, 1]
    assert chosen[("layers.1.mlp.up_proj",)] == {"model.layers.1.mlp.up_proj"}


def test_the_head_has_no_adapter() -> None:
    model = make("GPT-J")  # its head is not tied
    layers = Adapters(model, LORA)._layers
    assert layers and not any("lm_head" in name for name in layers)


@pytest.mark.parametrize(
    ("lora", "name", "message"),
    [
        (
            {"target_modules": ["q_porj"]},
            "Qwen2",
            r"target_modules: q_porj fits no linear layer .* choose from down_proj",
        ),
        ({"target_modules": ["q_proj", "lm_head"]}, "Qwen2", "lm_head fits no linear layer"),
        ({"target_modules": ["embed_tokens"]}, "Qwen2", "embed_tokens fits no linear layer"),
        ({"rank": 65}, "Qwen2", r"rank=65: must be at most 64, the width of model.layers.0.self_attn.k_proj; lower it"),
        ({}, "Mamba", "peft refuses this model .* choose other layers"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(lora: dict[str, Any], name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        Adapters(make(name), LoraConfig.model_validate({"rank": 4} | lora))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("targets", ["q_proj", []])
def test_targets_are_a_list_of_names(targets: Any) -> None:
    with pytest.raises(ValidationError, match="must be all-linear, or a list"):
        LoraConfig(rank=4, target_modules=targets)


def test_names_in_peft_files() -> None:
    model, _ = with_random_adapters("Qwen2", LoraConfig(rank=4, target_modules=("q_proj",)))
    assert set(peft_names(model.state_dict())) == {
        f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{part}.weight"
        for layer in (0, 1)
        for part in "AB"
    }


def load(path: Path, **settings: Any) -> tuple[PolicyModel, str]:
    return load_policy(
        str(path),
        dtype=torch.float32,
        attn_implementation="auto",
        temperature=1.0,
        chunk_tokens=64,
        lora=LORA,
        **settings,
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_adapters_alone(checkpointing: bool, tmp_path: Path) -> None:
    make("Qwen2").save_pretrained(tmp_path)
    policy, _ = load(tmp_path, gradient_checkpointing=checkpointing)
    tokens = torch.arange(40)
    policy(tokens, tokens, tokens.roll(-1))[0].sum().backward()
    moved = {name for name, parameter in policy.named_parameters() if parameter.grad is not None}
    assert {name for name, parameter in policy.named_parameters() if parameter.requires_grad} == moved
    assert all(is_adapter(name) for name in moved) and len(moved) == 28
    # B = 0 at the start: only B has a gradient that is not 0
    norms = {"A": 0.0, "B": 0.0}
    for name, parameter in policy.named_parameters():
        if parameter.grad is not None:
            norms["A" if ".lora_A." in name else "B"] += float(parameter.grad.norm())
    assert norms["A"] == 0 and norms["B"] > 0


def test_a_model_that_ignores_an_adapter_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As code of a model does that reads the weight of a layer and never calls it."""
    from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        gate = torch.nn.functional.linear(x, self.gate_proj.weight)
        return self.down_proj(self.act_fn(gate) * self.up_proj(x))

    make("Qwen2").save_pretrained(tmp_path)
    monkeypatch.setattr(Qwen2MLP, "forward", forward)
    with pytest.raises(ConfigError, match="learner's log-probs differ from the model's own"):
        load(tmp_path)
