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

BIN = Path(sys.executable).parent


def write_config(path: Path, model: str, num_steps: int) -> Path:
    """Synchronous, one engine, one sequence at a time; a checkpoint halfway."""
    tree = config_tree(
        path / "run",
        model={"kind": "pretrained", "path": model},
        generator={"deterministic": True},
        replay={"groups_per_step": 3, "group_size": 4, "max_staleness": 0},
        run={"num_steps": num_steps, "resume": "auto"},
        checkpoint={"every_steps": num_steps // 2},
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
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs of a shell ignore it
    )


def wait(process: subprocess.Popen[bytes], log: Path, seconds: float = 400) -> None:
    assert process.wait(timeout=seconds) == 0, log.read_text()


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def kill_after_step(process: subprocess.Popen[bytes], run: Path, step: int) -> None:
    """kill -9 of the controller; its actors end by themselves, as their owner has died."""
    deadline = time.monotonic() + 480
    while not ((run / "metrics.jsonl").is_file() and len(metrics(run)) >= step):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    family = psutil.Process(process.pid).children(recursive=True)
    # two agents of Ray's own outlive its raylet by a minute; nothing of ours may
    agents = [p for p in family if "Agent" in " ".join(p.cmdline())]
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=10)
    _, alive = psutil.wait_procs([p for p in family if p not in agents], timeout=60)
    for p in [*alive, *psutil.wait_procs(agents, timeout=0)[1]]:
        p.kill()
    assert not alive


KEYS = ("reward/mean", "policy/entropy", "step/grad_norm", "off_policy/staleness_max")


def same_metrics(run: Path) -> list[list[Any]]:
    """Of each step, what must be equal to the bit."""
    return [[m[k] for k in KEYS] for m in metrics(run)]


def test_a_killed_run_makes_its_steps_again_bit_for_bit(warm_model_path: str, tmp_path: Path) -> None:
    """It is killed after the step that follows its checkpoint; that one is made twice, and is the same both times."""
    steps, log, run = 6, tmp_path / "killed" / "log", tmp_path / "killed" / "run"
    config = write_config(tmp_path / "killed", warm_model_path, steps)
    kill_after_step(start(config, log), run, steps // 2 + 1)
    before = same_metrics(run)
    assert len(before) > steps // 2
    wait(start(config, log), log)
    assert same_metrics(run)[: len(before)] == before and len(metrics(run)) == steps
    check_accounts(run, steps)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_killed_and_resumed_is_bit_for_bit_the_run_that_was_not(warm_model_path: str, tmp_path: Path) -> None:
    steps, whole, killed = 6, tmp_path / "whole", tmp_path / "killed"
    wait(start(write_config(whole, warm_model_path, steps), whole / "log"), whole / "log")
    config = write_config(killed, warm_model_path, steps)
    kill_after_step(start(config, killed / "log"), killed / "run", steps // 2 + 1)
    wait(start(config, killed / "log"), killed / "log")

    expected, found = (load_file(p / "run" / "export" / "model.safetensors") for p in (whole, killed))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert same_metrics(whole / "run") == same_metrics(killed / "run")
    check_accounts(killed / "run", steps)


def check_accounts(run: Path, num_steps: int) -> None:
    check_ledger(run, num_steps)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["recovery"]["resumed"] == 1
    assert summary["groups_admitted"] == sum(summary["groups"].values()) == 3 * num_steps  # not one more was needed


def check_ledger(run: Path, num_steps: int) -> None:
    """Each step of the line that was kept has its groups, none twice; versions went on where the killed run was."""
    db = sqlite3.connect(f"file:{run / 'ledger.sqlite'}?mode=ro", uri=True)
    trained_from = Counter(v for (v,) in db.execute("SELECT learner_version FROM groups WHERE state = 'trained'"))
    assert set(trained_from.values()) == {3} and len(trained_from) == num_steps
    versions = db.execute("SELECT version, parent, step, fell_back FROM versions ORDER BY version").fetchall()
    (fallen,) = [v for v in versions if v[3]]
    half = num_steps // 2
    assert fallen[1:3] == (half, half) and fallen[0] > half + 1
    db.close()


def test_a_signal_during_the_start_is_answered_and_leaves_nothing_behind(warm_model_path: str, tmp_path: Path) -> None:
    """SIGTERM to the driver, then Ctrl-C, which Ray's processes get too: the same command must start again."""
    config = write_config(tmp_path / "ended", warm_model_path, 6)
    for number, send in ((signal.SIGTERM, os.kill), (signal.SIGINT, os.killpg)):
        log = tmp_path / "ended" / f"log-{number.name}"
        process = start(config, log)
        deadline = time.monotonic() + 240
        while "starting engines and learner" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        family = psutil.Process(process.pid).children(recursive=True)
        send(process.pid, number)
        assert process.wait(timeout=120) == 128 + number, log.read_text()
        assert log.read_text().count(f"ended: received {number.name} during the start") == 1
        assert "Traceback" not in log.read_text()
        _, alive = psutil.wait_procs(family, timeout=60)
        assert not alive
