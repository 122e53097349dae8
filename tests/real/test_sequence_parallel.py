"""Two ranks that share the tokens of a row: each passes half of them through the layers, and all numbers stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.models import make
from quatro_ray.engines.policy import PolicyModel
from quatro_ray.engines.sequence_parallel import Ranks
from quatro_ray.engines.varlen_attention import VARLEN
from tests.real.ranks import on_two_ranks

LENGTHS = [17, 3, 29]


def differences(name: Path) -> dict[str, Any]:
    """Tokens of the layers and of the head, and largest differences of log-probs and gradients from those alone."""
    causal_lm = make(name.name)
    causal_lm.set_attn_implementation(VARLEN)
    policy = PolicyModel(causal_lm, temperature=0.8, chunk_tokens=16)
    tokens = torch.arange(sum(LENGTHS)) * 7 % 50
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    row = (tokens, positions, tokens.roll(-1), positions > 1)
    weights = torch.arange(len(tokens)) % 5 - 2.0
    seen: list[int] = []
    causal_lm.get_decoder().layers[0].register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    causal_lm.get_output_embeddings().register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    found = []
    for group in (None, Ranks(dist.get_rank(), 2, 2).make_group(60)):
        policy.sequence_group = group
        policy.zero_grad()
        logprobs, entropy = policy(*row)
        (weights * (logprobs + 0.1 * entropy)).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
        if group:
            dist.all_reduce(gradient)
        found.append((logprobs.detach(), gradient))
    (alone, gradient), (shared, gradient_shared) = found
    return {
        "tokens": seen,
        "logprobs": float((alone - shared).abs().max()),
        "gradient": float((gradient - gradient_shared).norm() / gradient.norm()),
    }


@pytest.mark.parametrize("name", ["Qwen2", "Gemma 3 (text)", "Mixtral"])
def test_each_rank_computes_half_of_the_row_and_all_numbers_stay(name: str, tmp_path: Path) -> None:
    """49 tokens, so that one is padding."""
    (tmp_path / name).mkdir()
    counted = [0, 0]
    for rank, found in enumerate(on_two_ranks(differences, tmp_path / name)):
        whole, of_head, half, counted[rank] = found["tokens"]
        assert (whole, of_head, half) == (49, 43, 25)
        assert found["logprobs"] < 1e-4 and found["gradient"] < 1e-4
    assert sum(counted) == 43
