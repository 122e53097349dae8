"""The examples, as people start them."""

import re
import subprocess
from pathlib import Path

from tests.real.nodes import BIN, ROOT
from tests.real.run_files import check_accounts, read_lines


def example(path: str, *overrides: str) -> None:
    command = [str(BIN / "python"), path, *overrides]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_example_of_a_reward_trains(tmp_path: Path) -> None:
    run = tmp_path / "run"
    example("examples/add_a_reward.py", f"run.dir={run}", "model.warmup.max_steps=100", "evaluation.every_steps=3")
    metrics = read_lines(run / "metrics.jsonl")
    assert len(metrics) == 3
    # between two steps that follow each other fast, nothing may have been scored
    parts = [m["reward/part_early"] for m in metrics if "reward/part_early" in m]
    assert parts and all(0 <= p <= 1 for p in parts)


def test_the_example_of_an_objective_trains(tmp_path: Path) -> None:
    run = tmp_path / "run"
    example("examples/own_objective.py", f"run.dir={run}", "model.warmup.max_steps=100", "evaluation.every_steps=3")
    metrics = read_lines(run / "metrics.jsonl")
    assert len(metrics) == 3
    assert any(m["step/grad_norm"] > 0 for m in metrics)
    assert all(m["step/uninformative"] == (m["step/grad_norm"] == 0) for m in metrics)


def test_the_example_of_an_environment_trains(tmp_path: Path) -> None:
    """The policy asks, is given the result, and goes on; what it was given is not counted as sampled."""
    overrides = [
        f"run.dir={tmp_path / 'run'}",
        "run.num_steps=3",
        "learner.num_warmup_steps=1",
        "evaluation.every_steps=3",
    ]
    # it need not answer well, only ask
    short = ["model.warmup.max_steps=500", "evaluation.num_queries=8"]
    example("examples/calculator/calculator.py", *overrides, *short)
    check_accounts(tmp_path / "run", max_staleness=2, steps=3)
    rollouts = [r for g in read_lines(tmp_path / "run" / "rollouts.jsonl") for r in g["rollouts"]]
    asked = [r for r in rollouts if r["parts"]["calls"] > 0]
    assert asked and all(r["num_turns"] > 1 and "]" in r["transcript"] for r in asked)
    for r in asked:
        given = re.findall(r"\](\?|-?\d+);", r["transcript"])
        assert given and r["text"] not in ("", r["transcript"])
    assert any(m.get("rollout/turns", 0) > 1 for m in read_lines(tmp_path / "run" / "metrics.jsonl"))
