"""A run that is killed goes on: bit for bit where everything is deterministic."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.make import config_tree

pytestmark = pytest.mark.slow
BIN = Path(sys.executable).parent
STEPS = 6


def write_config(path: Path, model: str) -> Path:
    """Synchronous, one engine, one sequence at a time; a checkpoint halfway."""
    tree = config_tree(
        path / "run",
        model={"kind": "pretrained", "path": model},
        generator={"deterministic": True},
        replay={"groups_per_step": 3, "group_size": 4, "max_staleness": 0},
        run={"num_steps": STEPS, "resume": "auto"},
        checkpoint={"every_steps": STEPS // 2},
        evaluation={"num_queries": 2, "samples_per_query": 8},
        data={
            "train": {"sums": {"kind": "chain_sum", "max_digits": 1, "num_questions": 92}},
            "eval": {"sums": {"kind": "chain_sum", "max_digits": 1, "num_questions": 8, "seed": 1}},
        },
    )
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump(tree))
    return path / "config.yaml"


def start(config: Path, log: Path) -> subprocess.Popen[bytes]:
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    return subprocess.Popen(
        [str(BIN / "quatro-ray"), "train", str(config)],
        stdout=log.open("ab"),
        stderr=subprocess.STDOUT,
        env=environment,
    )


def wait(process: subprocess.Popen[bytes], log: Path, seconds: float = 300) -> None:
    assert process.wait(timeout=seconds) == 0, log.read_text()


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def kill_after_step(process: subprocess.Popen[bytes], run: Path, step: int) -> None:
    """kill -9 of the controller; its actors end by themselves, as their owner has died."""
    deadline = time.monotonic() + 240
    while not ((run / "metrics.jsonl").is_file() and len(metrics(run)) >= step):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    family = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=10)
    _, alive = psutil.wait_procs(family, timeout=60)
    names = [" ".join(p.cmdline()) for p in alive]
    for p in alive:
        p.kill()
    # two agents of Ray's own outlive its raylet by a while; nothing of ours does
    assert not [name for name in names if "Agent" not in name]


def test_killed_and_resumed_is_bit_for_bit_the_run_that_was_not(warm_model_path: str, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    wait(start(write_config(whole, warm_model_path), whole / "log"), whole / "log")
    config = write_config(killed, warm_model_path)
    kill_after_step(start(config, killed / "log"), killed / "run", STEPS // 2 + 1)
    wait(start(config, killed / "log"), killed / "log")

    expected, found = (load_file(p / "run" / "export" / "model.safetensors") for p in (whole, killed))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    keys = ("reward/mean", "policy/entropy", "step/grad_norm", "off_policy/staleness_max")
    assert [[m[k] for k in keys] for m in metrics(whole / "run")] == [
        [m[k] for k in keys] for m in metrics(killed / "run")
    ]
    check_ledger(killed / "run")
    summary = json.loads((killed / "run" / "summary.json").read_text())
    assert summary["recovery"]["resumed"] == 1
    assert summary["groups_admitted"] == sum(summary["groups"].values()) == 3 * STEPS  # not one more was needed


def check_ledger(run: Path) -> None:
    """Each step of the line that was kept has its groups, none twice; versions went on where the killed run was."""
    db = sqlite3.connect(f"file:{run / 'ledger.sqlite'}?mode=ro", uri=True)
    trained_from = Counter(v for (v,) in db.execute("SELECT learner_version FROM groups WHERE state = 'trained'"))
    assert set(trained_from.values()) == {3} and len(trained_from) == STEPS
    versions = db.execute("SELECT version, parent, step, fell_back FROM versions ORDER BY version").fetchall()
    (fallen,) = [v for v in versions if v[3]]
    assert fallen[1:3] == (STEPS // 2, STEPS // 2) and fallen[0] > STEPS // 2 + 1
    db.close()
