"""The learner trains a model only if its log-probs and gradients are the model's own; else each says what is wrong."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from benchmarks.models import ARCHITECTURES, make, measure
from quatro_ray.engines.policy import PolicyModel
from quatro_ray.engines.policy_loading import load_policy
from quatro_ray.errors import ConfigError
from quatro_ray.replay.packing import pack
from quatro_ray.replay.staleness import Lineage
from tests.make import group, rollout

PADDED = [
    "Qwen3-Next", "Qwen3.5 (text)", "LFM2", "Bamba", "Jamba", "Falcon-H1", "Mamba", "Falcon (ALiBi)", "BLOOM", "MPT",
    "gpt-oss",
]  # fmt: skip
PACKED = ["Qwen2", "Qwen3", "OPT", "Gemma 3 (text)", "Mixtral", "Qwen3-MoE", "DeepSeek-V3", "GPT-NeoX"]
HEADS = ["Phi", "GPT-J", "Gemma 2", "Cohere", "Granite"]


@pytest.mark.parametrize("name", PADDED)
def test_where_packed_sequences_leak_each_gets_a_row(name: str) -> None:
    layout, line = measure(name)
    assert layout == "padded"
    assert "packed sequences change each other" in line


@pytest.mark.parametrize("name", PACKED)
def test_where_they_do_not_leak_they_are_packed(name: str) -> None:
    assert measure(name)[0] == "packed"


@pytest.mark.parametrize("name", HEADS)
def test_heads_with_bias_scale_or_cap_are_supported(name: str) -> None:
    assert measure(name)[0] == "packed"


@pytest.mark.parametrize("name", ["Qwen2", "LFM2", "Falcon-H1", "Mixtral"])
def test_rounding_in_bfloat16_hides_no_leak(name: str) -> None:
    assert measure(name, torch.bfloat16)[0] == measure(name)[0]


def saved(name: str, path: Path) -> str:
    make(name).save_pretrained(path)
    return str(path)


def load(path: str, attn_implementation: str = "sdpa") -> tuple[PolicyModel, str]:
    return load_policy(
        path, dtype=torch.float32, attn_implementation=attn_implementation, temperature=0.8, chunk_tokens=32
    )


def test_a_head_that_nobody_knows_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By measurement alone: no list of names holds this one."""
    path = saved("Qwen2", tmp_path)
    plain = transformers.Qwen2ForCausalLM.forward

    def with_a_multiplier(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = plain(self, *args, **kwargs)
        output.logits = output.logits * 0.9
        return output

    monkeypatch.setattr(transformers.Qwen2ForCausalLM, "forward", with_a_multiplier)
    with pytest.raises(ConfigError, match=r"^model\.path=.* differ from the model's own \(0\.\d+ nats") as raised:
        load(path)
    assert "\n" not in str(raised.value)


def test_a_model_whose_code_fails_is_refused_with_its_reason() -> None:
    layout, line = measure("Llama 4 (text)")
    assert layout == "refused"
    assert line.startswith("Llama 4 (text): the learner cannot compute its log-probs (TypeError: ")
    assert "\n" not in line


def test_what_transformers_cannot_load_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"model\.path=.* learner\.attn_implementation=sdpa .*choose another"
    ) as raised:
        load(saved("BLOOM", tmp_path))
    assert "\n" not in str(raised.value)
    assert load(saved("BLOOM", tmp_path), attn_implementation="eager")[0].row_layout == "padded"


def test_padded_rows_give_the_log_probs_of_each_sequence_alone(tmp_path: Path) -> None:
    """Rollouts of uneven lengths, one of them of one token, as the learner packs them."""
    policy, _ = load(saved("LFM2", tmp_path))
    groups = [group(q, *(rollout(n) for n in (9, 1, 30)), prompt_tokens=1) for q in range(3)]
    batch = pack(groups, Lineage.unbroken(0), num_ranks=1, rank=0, tokens_per_micro_batch=64, row_layout="padded")
    with torch.no_grad():
        for micro in batch.micro_batches:
            tensors = [torch.from_numpy(a) for a in (micro.token_ids, micro.position_ids, micro.target_ids)]
            together, _ = policy(*tensors)
            starts = [*np.flatnonzero(micro.position_ids == 0), len(micro.position_ids)]
            for start, end in itertools.pairwise(starts):
                alone, _ = policy(*(t[start:end] for t in tensors))
                torch.testing.assert_close(together[start:end], alone, atol=1e-5, rtol=0)


def test_every_architecture_of_the_table_has_a_class() -> None:
    assert len(ARCHITECTURES) >= 25
    assert not [kind for kind, _ in ARCHITECTURES.values() if not hasattr(transformers, kind)]
