"""The command line, as people start it."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.make import own_data_config
from tests.real.nodes import BIN, ROOT
from tests.real.run_files import check_accounts, check_files, read_lines


def quatro_ray(*args: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / "quatro-ray"), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, cwd=ROOT)


def check_evaluations(run: Path) -> None:
    """Of engines of their own: each of the version that was exported for it, while training went on."""
    evaluations = read_lines(run / "evaluations.jsonl")
    assert [(e["step"], e["version"], e["set"]) for e in evaluations] == [(v, v, "own") for v in (0, 4)]
    groups = read_lines(run / "evaluation_rollouts.jsonl")
    assert len(groups) == 2 * 4
    assert all(len(g["rollouts"]) == 8 for g in groups)
    assert not [p for p in (run / "evaluating").iterdir() if p.is_dir()]


def check_converted(run: Path) -> None:
    """The checkpoint's ZeRO shards are the weights of the export, and were evaluated."""
    exported = load_file(run / "export" / "model.safetensors")
    converted: dict[str, Any] = {}
    for path in (run / "evaluation" / "model").glob("*.safetensors"):
        converted |= load_file(path)
    assert exported.keys() <= converted.keys()
    assert all(torch.equal(exported[name], converted[name]) for name in exported)
    (result,) = read_lines(run / "evaluation" / "evaluations.jsonl")
    assert result["num_queries"] == 4 and 0 <= result["pass_at_1"] <= 1


def check_replayed(run: Path) -> None:
    """A step that was to be kept is made again, bit for bit; the rollouts of another one are gone."""
    replayed = quatro_ray("replay", str(run), "3", "--out", str(run.parent / "again"), timeout_s=240)
    assert replayed.returncode == 0, replayed.stdout + replayed.stderr
    assert "replaying step 3 to 3 from the checkpoint step_2" in replayed.stdout
    assert "the same bit for bit" in replayed.stdout
    assert {p.name for p in (run.parent / "again").iterdir()} == {"export", "metrics.json", "rollouts.json"}
    gone = quatro_ray("replay", str(run), "2")
    assert gone.returncode == 2
    assert "the rollouts of step 1 are freed" in gone.stderr


@pytest.fixture
def own_data(tmp_path: Path) -> Path:
    return own_data_config(tmp_path)


def test_training_on_own_prompts_with_an_engine_for_evaluation(own_data: Path, tmp_path: Path) -> None:
    done = quatro_ray("train", str(own_data), timeout_s=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "INFO quatro_ray" not in done.stdout + done.stderr  # log messages are for --verbose
    check_accounts(tmp_path / "run", max_staleness=2, steps=4)
    check_files(tmp_path / "run")
    check_evaluations(tmp_path / "run")
    evaluated = quatro_ray("eval", str(own_data), "--checkpoint", "step_4", timeout_s=400)
    assert evaluated.returncode == 0, evaluated.stdout + evaluated.stderr
    check_converted(tmp_path / "run")
    check_replayed(tmp_path / "run")
    again = quatro_ray("train", str(own_data))
    assert again.returncode == 2
    assert "is not empty; choose another, or set run.overwrite=true" in again.stderr
    assert "Traceback" not in again.stderr


def test_a_cluster_that_is_too_small_is_one_line(own_data: Path) -> None:
    """What is wrong before a cluster is asked for is in tests/unit/test_cli.py."""
    done = quatro_ray("train", str(own_data), "cluster.cpus_per_rank=50", timeout_s=240)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "CPUs and the cluster has" in done.stderr
    assert "Traceback" not in done.stderr
