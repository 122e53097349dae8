"""As people run it: `ray job submit` to a head with token authentication."""

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.real.nodes import ROOT, Head, ray_head
from tests.real.run_files import check_accounts, check_files


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with ray_head(tmp_path_factory.mktemp("head"), num_cpus=2) as running:
        yield running


def test_a_client_without_the_token_is_refused(head: Head) -> None:
    refused = head.ray("job", "submit", "--address", head.dashboard, "--", "echo", "hello", token=False)
    assert refused.returncode != 0


STOP_WAIT = '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60"}}'
"""Runtime environment of a job that gets more than 3 s when it is told to stop."""


def submit(head: Head, run_dir: Path, *overrides: str) -> str:
    """The demo, with overrides. Returns the id of the job."""
    command = ["quatro-ray", "train", str(ROOT / "configs/demo.yaml"), f"run.dir={run_dir}", *overrides]
    options = ["--address", head.dashboard, "--no-wait", "--runtime-env-json", STOP_WAIT]
    submitted = head.ray("job", "submit", *options, "--", *command)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    job = re.search(r"raysubmit_\w+", submitted.stdout)
    assert job
    return job[0]


def end_of(head: Head, job: str, seconds: float, sign: Path) -> tuple[str, str]:
    """Waits for the end; `sign` is a file that appears shortly before. Returns status and logs."""
    status = ""
    deadline = time.monotonic() + seconds
    while not any(end in status for end in ("succeeded", "failed", "stopped")) and time.monotonic() < deadline:
        wait_for(sign, seconds=20)  # each look at the status starts a Python with Ray in it
        shown = head.ray("job", "status", "--address", head.dashboard, job)
        status = (shown.stdout + shown.stderr).lower()
    return status, head.ray("job", "logs", "--address", head.dashboard, job).stdout


def train_as_a_job(head: Head, run_dir: Path, *overrides: str, seconds: float) -> dict[str, Any]:
    """To the end; what the job logs has its report and not the token. Returns its summary."""
    status, logs = end_of(head, submit(head, run_dir, *overrides), seconds, run_dir / "report.html")
    assert "succeeded" in status, f"{status}\n{logs}"
    assert "report: " in logs
    assert head.environment["RAY_AUTH_TOKEN"] not in logs
    return json.loads((run_dir / "summary.json").read_text())


def wait_for(path: Path, seconds: float) -> None:
    """Until it is there, or the time is over."""
    until = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.2)


def test_a_job_that_is_stopped_leaves_a_checkpoint_and_goes_on_when_it_is_submitted_again(
    head: Head, warm_model_path: str, tmp_path: Path
) -> None:
    run_dir = tmp_path / "demo"
    few = ["run.overwrite=false", "run.resume=auto", "checkpoint.every_steps=1000"]
    few += ["evaluation.every_steps=6", "evaluation.num_queries=16"]
    few += [f"model={{kind: pretrained, path: {warm_model_path}}}"]
    job = submit(head, run_dir, *few, "run.num_steps=2000")
    deadline = time.monotonic() + 300
    while not (run_dir / "metrics.jsonl").is_file() or not (run_dir / "metrics.jsonl").read_text():
        assert time.monotonic() < deadline, end_of(head, job, 0, run_dir)
        time.sleep(0.2)
    head.ray("job", "stop", "--address", head.dashboard, "--no-wait", job)
    status, logs = end_of(head, job, 120, run_dir / "checkpoints")
    assert "stopped" in status, f"{status}\n{logs}"
    assert "a checkpoint is written; rerun with run.resume=auto to continue" in logs
    done = max(int(path.name.removeprefix("step_")) for path in (run_dir / "checkpoints").glob("step_*"))
    steps = max(12, done + 6)  # more than those in which the learning rate grows
    summary = train_as_a_job(head, run_dir, *few, f"run.num_steps={steps}", seconds=600)
    assert summary["recovery"]["resumed"] == 1 and summary["recovery"]["steps_lost"] == 0
    check_accounts(run_dir, max_staleness=4, steps=steps)
    assert any(int(s) > 0 and n > 0 for s, n in summary["staleness_tokens"].items())
    check_files(tmp_path / "demo")


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_the_demo_as_a_submitted_job(head: Head, tmp_path: Path) -> None:
    """The whole demo, as `make demo` runs it, and everything it promises."""
    summary = train_as_a_job(head, tmp_path / "demo", seconds=1500)
    assert summary["pass_at_1_end"] >= summary["pass_at_1_start"] + 0.25
    assert summary["pass_at_8_end"] >= summary["pass_at_8_start"]
    assert 0.2 <= summary["pass_at_1_start"] <= 0.45
    assert summary["in_flight_updates"] >= 10
    assert summary["multi_version_rollouts"] > 0
    check_accounts(tmp_path / "demo", max_staleness=4, steps=200)
    assert any(int(s) > 0 and n > 0 for s, n in summary["staleness_tokens"].items())
    check_files(tmp_path / "demo")
