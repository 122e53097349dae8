"""A whole asynchronous run that trains adapters; it is killed, and goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from tests.make import config_tree
from tests.real.test_resume import kill_after_step, metrics, start, wait

STEPS, STALENESS = 8, 2


def write_config(path: Path, model: str, sync: str) -> Path:
    tree = config_tree(
        path / "run",
        model={"kind": "pretrained", "path": model},
        learner={
            "num_ranks": 2,
            "learning_rate": 1e-3,
            "dtype": "float32",
            "tokens_per_micro_batch": 256,
            "reference_kl_coef": 1e-3,
            "lora": {"rank": 8, "alpha": 16, "sync": sync},
        },
        replay={"groups_per_step": 8, "group_size": 8, "max_staleness": STALENESS},
        run={"num_steps": STEPS, "resume": "auto"},
        checkpoint={"every_steps": STEPS // 2},
        evaluation={"num_queries": 8, "samples_per_query": 8},
        weight_sync={"check_every_updates": 1},
        data={
            "train": {"sums": {"kind": "chain_sum", "max_digits": 1, "num_questions": 92}},
            "eval": {"sums": {"kind": "chain_sum", "max_digits": 1, "num_questions": 8, "seed": 1}},
        },
    )
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.yaml").write_text(yaml.safe_dump(tree))
    return path / "config.yaml"


@pytest.mark.parametrize("sync", ["adapter", pytest.param("merged", marks=pytest.mark.soak)])
def test_a_run_with_adapters_learns_and_resumes(warm_model_path: str, tmp_path: Path, sync: str) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    config = write_config(tmp_path, warm_model_path, sync)
    kill_after_step(start(config, log), run, STEPS // 2 + 1)
    wait(start(config, log), log)

    found = metrics(run)
    assert [m["step"] for m in found] == list(range(1, STEPS + 1))
    # engines score tokens as the learner does after each update, and sampled them so
    assert max(m["weight_sync/logprob_abs_diff"] for m in found) < 1e-3
    assert max(m["off_policy/staleness_max"] for m in found) > 0
    assert max(m["policy/reference_kl"] for m in found) > 0
    rewards = [m["reward/mean"] for m in found]
    assert sum(rewards[STEPS // 2 :]) > sum(rewards[: STEPS // 2]) - 0.2 * STEPS // 2
    summary = json.loads((run / "summary.json").read_text())
    assert summary["recovery"]["resumed"] == 1
    AutoModelForCausalLM.from_pretrained(run / "export")
    assert (run / "export" / "adapter" / "adapter_model.safetensors").is_file()
