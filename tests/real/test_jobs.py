"""As people run it: `quatro-ray submit` and `ray job submit`, to a head with token authentication."""

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.real.nodes import BIN, ROOT, Head, ray_head
from tests.real.run_files import check_accounts, check_files


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with ray_head(tmp_path_factory.mktemp("head"), num_cpus=2) as running:
        yield running


def submission(head: Head, here: Path, *args: str, token: bool = True) -> subprocess.Popen[str]:
    """`quatro-ray submit`, started in a folder."""
    command = [str(BIN / "quatro-ray"), "submit", *args, "--address", head.dashboard]
    env = {k: v for k, v in head.environment.items() if token or k != "RAY_AUTH_TOKEN"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, cwd=here, stdout=pipe, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("submits", ["ray", "quatro-ray"])
def test_a_client_without_the_token_is_refused(head: Head, submits: str) -> None:
    if submits == "ray":
        refused = head.ray("job", "submit", "--address", head.dashboard, "--", "echo", "hello", token=False)
        assert refused.returncode != 0
    else:
        process = submission(head, ROOT, "configs/demo.yaml", "run.dir=/tmp/never", token=False)
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 2
        assert said.count("\n") == 1 and "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN as on the cluster" in said


def test_ray_job_submit_without_a_working_directory_takes_absolute_paths_only(head: Head) -> None:
    """Relative ones would start wherever the head was started."""
    command = ["quatro-ray", "train", str(ROOT / "configs/demo.yaml"), "model={kind: pretrained, path: examples}"]
    submitted = head.ray("job", "submit", "--address", head.dashboard, "--", *command)
    said = submitted.stdout + submitted.stderr
    assert submitted.returncode != 0
    assert "run.dir='runs/demo': is relative; in a job it would lie in a copy of the working directory" in said
    assert "model.path='examples': is relative, and the job has no working directory" in said


@pytest.fixture
def here(tmp_path: Path, warm_model_path: str) -> Path:
    """A folder with the demo's configuration, a model, and a reward with a module of its own."""
    folder = tmp_path / "here"
    folder.mkdir()
    shutil.copytree(warm_model_path, folder / "model")
    (folder / "helpers.py").write_text("def length_of(text):\n    return float(len(text))\n")
    lines = ["from helpers import length_of", "", "def score(query, response):", "    return length_of(response.text)"]
    (folder / "own_reward.py").write_text("\n".join(lines) + "\n")
    demo = yaml.safe_load((ROOT / "configs/demo.yaml").read_text())
    demo["model"] = {"kind": "pretrained", "path": "model"}
    demo["rewards"]["short"] = {"kind": "python", "function": "own_reward.py:score", "weight": -0.001}
    demo["run"] |= {"dir": str(tmp_path / "run"), "overwrite": False, "resume": "auto"}
    demo["evaluation"] |= {"every_steps": 6, "num_queries": 16}
    demo["checkpoint"]["every_steps"] = 1000
    (folder / "job.yaml").write_text(yaml.safe_dump(demo))
    return folder


def wait_until_it_trains(process: subprocess.Popen[str], run_dir: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not (run_dir / "metrics.jsonl").is_file() or not (run_dir / "metrics.jsonl").read_text():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=60)[0]
        time.sleep(0.2)


def test_a_job_that_is_stopped_leaves_a_checkpoint_and_goes_on_when_it_is_submitted_again(
    head: Head, here: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    what = ["job.yaml", "--include", "helpers.py"]
    job = submission(head, here, *what, "run.num_steps=2000")
    wait_until_it_trains(job, run_dir, seconds=300)
    job.send_signal(signal.SIGINT)
    said, _ = job.communicate(timeout=120)
    assert job.returncode == 143, said
    assert "a checkpoint is written; rerun with run.resume=auto to continue" in said
    assert "# own_reward.py: " in said and "in the job's working directory" in said
    assert head.environment["RAY_AUTH_TOKEN"] not in said
    done = max(int(path.name.removeprefix("step_")) for path in (run_dir / "checkpoints").glob("step_*"))
    steps = max(12, done + 6)  # more than those in which the learning rate grows
    elsewhere = here.rename(tmp_path / "elsewhere")
    job = submission(head, elsewhere, *what, f"run.num_steps={steps}")
    said, _ = job.communicate(timeout=600)
    assert job.returncode == 0, said
    assert f"report: {run_dir}/report.html" in said and said.count("report: ") == 1
    check_resumed(run_dir, steps)


def check_resumed(run_dir: Path, steps: int) -> None:
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["recovery"]["resumed"] == 1 and summary["recovery"]["steps_lost"] == 0
    check_accounts(run_dir, max_staleness=4, steps=steps)
    assert any(int(s) > 0 and n > 0 for s, n in summary["staleness_tokens"].items())
    check_files(run_dir)


def test_the_exit_status_is_that_of_the_run(head: Head, here: Path) -> None:
    """A run that is refused on the cluster: what is wrong is known only there."""
    wrong = "data.train.sums={kind: jsonl, path: /on/the/cluster.jsonl}"
    process = submission(head, here, "job.yaml", "--include", "helpers.py", wrong)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 2, said
    assert "error: data.train.sums.path=/on/the/cluster.jsonl: cannot be read" in said, said


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_the_demo_as_a_submitted_job(head: Head, tmp_path: Path) -> None:
    """The whole demo, as `make demo` runs it, and everything it promises."""
    job = submission(head, ROOT, "configs/demo.yaml", f"run.dir={tmp_path / 'demo'}")
    said, _ = job.communicate(timeout=1500)
    assert job.returncode == 0, said
    summary: dict[str, Any] = json.loads((tmp_path / "demo/summary.json").read_text())
    assert summary["pass_at_1_end"] >= summary["pass_at_1_start"] + 0.25
    assert summary["pass_at_8_end"] >= summary["pass_at_8_start"]
    assert 0.2 <= summary["pass_at_1_start"] <= 0.45
    assert summary["in_flight_updates"] >= 10
    assert summary["multi_version_rollouts"] > 0
    check_accounts(tmp_path / "demo", max_staleness=4, steps=200)
    assert any(int(s) > 0 and n > 0 for s, n in summary["staleness_tokens"].items())
    check_files(tmp_path / "demo")
