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


def train_as_a_job(head: Head, run_dir: Path, *overrides: str, seconds: float) -> dict[str, Any]:
    """The demo, with overrides, to its end; what it logs has its report and not the token. Returns its summary."""
    command = ["quatro-ray", "train", str(ROOT / "configs/demo.yaml"), f"run.dir={run_dir}", *overrides]
    submitted = head.ray("job", "submit", "--address", head.dashboard, "--no-wait", "--", *command)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    job = re.search(r"raysubmit_\w+", submitted.stdout)
    assert job
    status = ""
    deadline = time.monotonic() + seconds
    while "succeeded" not in status and "failed" not in status and time.monotonic() < deadline:
        wait_for(run_dir / "report.html", seconds=20)  # each look at the status starts a Python with Ray in it
        shown = head.ray("job", "status", "--address", head.dashboard, job[0])
        status = (shown.stdout + shown.stderr).lower()
    logs = head.ray("job", "logs", "--address", head.dashboard, job[0]).stdout
    assert "succeeded" in status, f"{status}\n{logs}"
    assert "report: " in logs
    assert head.environment["RAY_AUTH_TOKEN"] not in logs
    return json.loads((run_dir / "summary.json").read_text())


def wait_for(path: Path, seconds: float) -> None:
    """Until it is there, or the time is over."""
    until = time.monotonic() + seconds
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.2)


def test_a_few_steps_of_the_demo_as_a_submitted_job(head: Head, warm_model_path: str, tmp_path: Path) -> None:
    few = ["run.num_steps=12", "evaluation.every_steps=6", "evaluation.num_queries=16", "checkpoint.every_steps=6"]
    model = f"model={{kind: pretrained, path: {warm_model_path}}}"
    summary = train_as_a_job(head, tmp_path / "demo", *few, model, seconds=600)
    check_accounts(tmp_path / "demo", max_staleness=4, steps=12)
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
