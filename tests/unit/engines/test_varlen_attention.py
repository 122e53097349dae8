"""Attention without a mask: the same numbers as with one, one kernel call per sequence, and memory linear in tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.models import make, measure
from quatro_ray.engines.policy import PolicyModel
from quatro_ray.engines.policy_loading import load_policy
from quatro_ray.engines.varlen_attention import UnsupportedAttentionError, varlen_attention

LENGTHS = [7, 1, 30, 12]


def policy_of(causal_lm: Any, attention: str) -> PolicyModel:
    policy = PolicyModel(causal_lm, temperature=1.0, chunk_tokens=64)
    causal_lm.set_attn_implementation(attention)
    return policy


def packed(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens = torch.arange(sum(lengths)) * 7 % 50
    return tokens, torch.cat([torch.arange(n) for n in lengths]), tokens.roll(-1)


def windowed_model() -> Any:
    """Half of its layers let a token see 8 tokens, the others all."""
    torch.manual_seed(0)
    return transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            use_sliding_window=True,
            sliding_window=8,
            max_window_layers=2,
        )
    )


def test_log_probs_and_gradients_are_those_of_a_masked_row() -> None:
    policy = policy_of(windowed_model(), "sdpa")
    results = []
    for attention in ("sdpa", "varlen"):
        policy.causal_lm.set_attn_implementation(attention)
        policy.zero_grad()
        logprobs, _ = policy(*packed(LENGTHS))
        (logprobs * torch.arange(50.0)).sum().backward()
        gradients = [p.grad.clone() for p in policy.parameters() if p.grad is not None]
        results.append((logprobs.detach(), gradients))
    (masked, masked_gradients), (unmasked, gradients) = results
    torch.testing.assert_close(unmasked, masked, atol=1e-5, rtol=0)
    for one, other in zip(gradients, masked_gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


def test_a_window_changes_what_a_token_sees() -> None:
    """Otherwise the test above could not fail."""
    wide, narrow = windowed_model(), windowed_model()
    for layer in wide.model.layers:
        layer.self_attn.sliding_window = None
    wide.config.layer_types = ["full_attention"] * 4
    one, other = (policy_of(model, "varlen")(*packed(LENGTHS))[0] for model in (wide, narrow))
    changed = (one - other).abs() > 1e-6
    assert not changed[:8].any() and changed[16:38].all()


@contextmanager
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    lengths: list[int] = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def counting(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        lengths.append(query.shape[2])
        return plain(query, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", counting)
        yield lengths


def test_every_layer_calls_the_kernel_once_per_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of(make("Qwen2"), "varlen")
    with kernel_calls(monkeypatch) as lengths:
        policy(*packed(LENGTHS))
    assert lengths == LENGTHS * policy.causal_lm.config.num_hidden_layers


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operation returns."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


def largest_tensor(policy: PolicyModel, tokens: int) -> int:
    with LargestTensor() as mode:
        policy(*packed([tokens // 2, tokens // 4, tokens // 4]))[0].sum().backward()
    return mode.largest


def test_memory_grows_linearly_with_the_tokens_of_a_row() -> None:
    policy = policy_of(make("Qwen2"), "varlen")
    sizes = [largest_tensor(policy, tokens) for tokens in (2048, 4096, 8192)]
    assert all(larger <= 2.05 * smaller for smaller, larger in pairwise(sizes))
    policy.causal_lm.set_attn_implementation("sdpa")
    assert largest_tensor(policy, 8192) >= 8192**2 > 4 * sizes[-1]


def attend(**changes: Any) -> None:
    tensor = torch.zeros(1, 2, 5, 4)
    varlen_attention(torch.nn.Module(), tensor, tensor, tensor, **{"attention_mask": None, **changes})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"softcap": 30.0}, "softcap"),
        ({"s_aux": torch.zeros(2)}, "s_aux"),
        ({"is_causal": False}, "tokens that follow"),
        ({"attention_mask": torch.full((1, 1, 1, 1), 8)}, "no sliding window"),
        ({"attention_mask": torch.full((1, 1, 1, 1), 8), "sliding_window": 4}, "no sliding window"),
    ],
)
def test_what_it_does_not_compute_is_refused(changes: dict[str, Any], reason: str) -> None:
    attend()
    with pytest.raises(UnsupportedAttentionError, match=reason):
        attend(**changes)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("Qwen3", "attention: varlen"),
        ("Gemma 3 (text)", "attention: varlen"),
        ("Gemma 2", "attention: sdpa; not varlen (the learner cannot compute its log-probs (UnsupportedAttentionError"),
        ("StableLM", "attention: sdpa; not varlen, with which they change each other"),
        ("GPT-J", "attention: eager; not varlen (it has attention of its own, not transformers' interface)"),
    ],
)
def test_a_model_gets_the_first_attention_with_which_it_can_be_packed(name: str, line: str) -> None:
    layout, found = measure(name)
    assert layout == "packed" and line in found


def test_auto_is_what_a_saved_model_is_loaded_with(tmp_path: Any) -> None:
    make("Qwen2").save_pretrained(tmp_path)
    policy, line = load_policy(
        str(tmp_path), dtype=torch.float32, attn_implementation="auto", temperature=1.0, chunk_tokens=64
    )
    assert policy.attention == "varlen" and line.endswith("attention: varlen")
