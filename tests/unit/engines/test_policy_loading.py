"""What a loaded policy keeps for the backward pass, and that training mode makes nothing random."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import transformers

from benchmarks.models import make
from quatro_ray.engines.policy import PolicyModel
from quatro_ray.engines.policy_loading import load_policy
from quatro_ray.errors import ConfigError


def load(path: Path, checkpointing: bool) -> PolicyModel:
    policy, _ = load_policy(
        str(path),
        dtype=torch.float32,
        attn_implementation="auto",
        temperature=1.0,
        chunk_tokens=64,
        gradient_checkpointing=checkpointing,
    )
    return policy


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens = torch.arange(48) * 7 % 50
    return tokens, torch.cat([torch.arange(24), torch.arange(24)]), tokens.roll(-1)


def _count(calls: list[int], *_: object) -> None:
    calls.append(1)


def test_gradient_checkpointing_keeps_less_and_computes_each_layer_again(tmp_path: Path) -> None:
    make("Qwen2").save_pretrained(tmp_path)
    kept, passes, gradients = [], [], []
    for checkpointing in (False, True):
        policy = load(tmp_path, checkpointing)
        sizes: list[int] = []
        calls: list[int] = []
        policy.causal_lm.get_decoder().layers[0].register_forward_pre_hook(partial(_count, calls))

        def keep(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            total = policy(*inputs())[0].sum()
            kept.append(sum(sizes))
        total.backward()
        passes.append(len(calls))
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]))
    assert passes == [1, 2]
    assert kept[1] < 0.5 * kept[0]
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "resid_pdrop": 0.5}),
        ("OPTForCausalLM", {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                            "word_embed_proj_dim": 32, "max_position_embeddings": 64, "dropout": 0.5}),
    ],
)  # fmt: skip
def test_dropout_is_off_in_training_mode(model: str, settings: dict[str, float], tmp_path: Path) -> None:
    kind = getattr(transformers, model)
    kind(kind.config_class(vocab_size=50, **settings)).save_pretrained(tmp_path)
    policy = load(tmp_path, checkpointing=True)
    assert policy.causal_lm.training
    one, other = (policy(*inputs())[0] for _ in range(2))
    torch.testing.assert_close(one, other, atol=0, rtol=0)


def test_a_model_that_cannot_recompute_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("Qwen2").save_pretrained(tmp_path)
    monkeypatch.setattr(transformers.Qwen2ForCausalLM, "supports_gradient_checkpointing", False)
    with pytest.raises(ConfigError, match=r"learner\.gradient_checkpointing=true: .* set it to false"):
        load(tmp_path, checkpointing=True)


def test_the_head_sees_the_counted_tokens_alone(tmp_path: Path) -> None:
    make("Qwen2").save_pretrained(tmp_path)
    policy, seen = load(tmp_path, checkpointing=False), []
    head = policy.causal_lm.get_output_embeddings()
    head.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    counted = torch.arange(48) % 3 == 0
    for chosen in (counted, torch.zeros_like(counted)):
        for found, every in zip(policy(*inputs(), chosen), policy(*inputs()), strict=True):
            torch.testing.assert_close(found, torch.where(chosen, every, 0.0))
    assert seen == [16, 48, 0, 48]
