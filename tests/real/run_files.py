"""What every run promises about the files that it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_accounts(run_dir: Path, *, max_staleness: int, steps: int) -> None:
    summary = json.loads((run_dir / "summary.json").read_text())
    assert sum(summary["groups"].values()) == summary["groups_admitted"]
    assert summary["groups"]["dropped"] == sum(summary["drops"].values())
    assert summary["learner_steps"] == summary["weight_updates"] == steps
    assert max(int(s) for s in summary["staleness_tokens"]) <= max_staleness
    assert sum(summary["staleness_tokens"].values()) == summary["trained_tokens"] <= summary["generated_tokens"]
    assert all(v > 0 for v in summary["peak_rss_bytes"].values())
    phases = ("wait", "train", "sync", "evaluate", "export", "checkpoint")
    learner = sum(summary["seconds"].get(p, 0.0) for p in phases)
    assert 0 < learner < summary["seconds"]["total"]


def check_files(run_dir: Path) -> None:
    metrics = read_lines(run_dir / "metrics.jsonl")
    agreement = [m["rollout_corr/logprob_abs_diff"] for m in metrics if m["rollout_corr/logprob_abs_diff"] is not None]
    assert agreement and max(agreement) < 1e-3
    assert [m["step"] for m in metrics] == list(range(1, len(metrics) + 1))
    assert all(m["rollout/num"] > 0 and 0 <= m["rollout/truncated_share"] <= 1 for m in metrics)
    rollouts = read_lines(run_dir / "rollouts.jsonl")
    assert {"text", "reward", "versions"} <= rollouts[0]["rollouts"][0].keys()
    assert list((run_dir / "tensorboard").glob("events.out.tfevents.*"))
    assert list((run_dir / "checkpoints").glob("step_*/*optim_states.pt"))
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["run"]["seed"] == 0
    page = (run_dir / "report.html").read_text()
    assert "could not be read" not in page
    assert page.count("<svg") == page.count("<figcaption>")
    for title in ("Reward of the trained batch", "Response length", "Learning rate", "Tokens a second"):
        assert f"<figcaption>{title}</figcaption>" in page
    assert "<figcaption>What learner and generators were doing</figcaption>" in page
    assert "<script" not in page and 'src="http' not in page
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "export")
    model = AutoModelForCausalLM.from_pretrained(run_dir / "export")
    out = model.generate(torch.tensor([tokenizer.encode("1+1=")]), max_new_tokens=4, do_sample=False)
    assert out.shape[1] > 4
