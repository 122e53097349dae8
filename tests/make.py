"""Small groups and configurations for tests."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from quatro_ray.config import Config
from quatro_ray.replay.packing import pack
from quatro_ray.replay.staleness import Lineage
from quatro_ray.types import LearnerBatch, Outcome, Query, Rollout, RolloutGroup, Score, VersionSpan

needs_sandbox = pytest.mark.skipif(
    shutil.which("bwrap") is None and "QUATRO_REQUIRE_SANDBOX" not in os.environ,
    reason="bubblewrap is not installed: apt install bubblewrap (QUATRO_REQUIRE_SANDBOX=1 makes this a failure)",
)


def rollout(tokens: int = 3, version: int = 0, reward: float | None = 1.0, newer_from: int | None = None) -> Rollout:
    """`newer_from`: tokens from there on come from version + 1."""
    cut = tokens if newer_from is None else newer_from
    spans = tuple(s for s in (VersionSpan(version, 0, cut), VersionSpan(version + 1, cut, tokens)) if s.start < s.end)
    return Rollout(
        token_ids=np.arange(5, 5 + tokens, dtype=np.int32),
        behavior_logprobs=-np.arange(1, 1 + tokens, dtype=np.float32),
        spans=spans,
        text="4 2" * tokens,
        finish_reason="stop",
        score=None if reward is None else Score(reward, Outcome.OK, "fine"),
    )


def group(group_id: int, *rollouts: Rollout, prompt_tokens: int = 2) -> RolloutGroup:
    prompt = np.arange(1, 1 + prompt_tokens, dtype=np.int32)
    query = Query(f"q{group_id}", "1+1=", "2", {"level": "easy"})
    return RolloutGroup(group_id, query, prompt, rollouts or (rollout(), rollout(reward=0.0)))


def pack_all(
    groups: Sequence[RolloutGroup], lineage: Lineage, *, num_ranks: int, **settings: Any
) -> list[LearnerBatch]:
    """Return the batch of every rank."""
    return [pack(groups, lineage, num_ranks=num_ranks, rank=rank, **settings) for rank in range(num_ranks)]


def config_tree(run_dir: Path | str = "runs/test", **sections: dict[str, Any]) -> dict[str, Any]:
    """A small valid configuration on CPU; `sections` are merged over it."""
    tree: dict[str, dict[str, Any]] = {
        "run": {"dir": str(run_dir), "num_steps": 3, "seed": 0},
        "model": {"kind": "tiny", "warmup": {"max_steps": 1}},
        "data": {
            "train": {"sums": {"kind": "chain_sum", "num_questions": 200}},
            "eval": {"sums": {"kind": "chain_sum", "num_questions": 16, "seed": 1}},
        },
        "rewards": {"answer": {"kind": "integer"}},
        "generator": {
            "max_prompt_tokens": 16,
            "max_response_tokens": 8,
            "max_num_seqs": 16,
            "dtype": "float32",
            "kv_cache_gib": 0.1,
        },
        "replay": {"groups_per_step": 4, "group_size": 4, "max_staleness": 2},
        "objective": {"kind": "quatro"},
        "learner": {"num_ranks": 2, "learning_rate": 1e-3, "dtype": "float32", "tokens_per_micro_batch": 64},
        "evaluation": {"num_queries": 4, "samples_per_query": 8},
        "cluster": {"device": "cpu", "cpus_per_engine": 0.5, "cpus_per_rank": 0.4, "cpus_per_verifier": 0.05},
    }
    for name, values in sections.items():
        whole = "kind" in values or name == "rewards"
        tree[name] = values if whole else tree.get(name, {}) | values
    return tree


def config(run_dir: Path | str = "runs/test", **sections: dict[str, Any]) -> Config:
    return Config.model_validate(config_tree(run_dir, **sections))


def own_data_config(folder: Path) -> Path:
    """A configuration over the user's own JSON lines, GRPO this time, with a schedule and an engine for evaluation."""
    rows = [{"question": f"say {c}:", "gold": c} for c in "abcdefghijklmnopqrstuvwxyz"]
    for name, part in (("train", rows[:20]), ("eval", rows[20:])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    tree = config_tree(
        folder / "run",
        data={
            name: {"own": {"kind": "jsonl", "path": str(folder / f"{name}.jsonl"), "answer_key": "gold"}}
            for name in ("train", "eval")
        },
        rewards={"answer": {"kind": "exact"}},
        objective={"kind": "grpo"},
        learner={"schedule": "cosine", "loss_agg_mode": "seq_mean_token_sum"},
        run={"num_steps": 4},
        replay={"keep_steps": [3]},
        evaluation={"num_engines": 1, "every_steps": 4, "samples_per_query": 8, "num_queries": 4},
        cluster={"cpus_per_engine": 0.3},
    )
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path
