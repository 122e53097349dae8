"""The script for Slurm: who gets SIGTERM, when the job is queued again, and what Slurm is asked for.

Slurm is not here, and what is tested is the script alone. So `srun` and `scontrol`, and the programs that the script
starts, are short stand-ins that write down how they are called.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from quatro_ray.config import load_config
from quatro_ray.orchestrator import cluster
from tests.unit.deploy.overlays import BIN, ROOT

pytestmark = pytest.mark.process

SCRIPT = ROOT / "deploy/slurm/train.sh"
CONFIG = "configs/demo.yaml"
SLURM = {"SLURM_JOB_ID": "17", "SLURM_CPUS_PER_TASK": "4", "SLURM_GPUS_ON_NODE": "8", "SLURMD_NODENAME": "node1"}
STAND_INS = {
    "ray": """
        if [ "$1" = status ]; then
            if mv "$FOLDER/status_hangs" "$FOLDER/status_hung" 2>/dev/null; then exec sleep 1000; fi
            [ "$(cat "$FOLDER/ray_started" | wc -l)" = "$NUM_STARTS" ] && cat "$FOLDER/status"
            exit
        fi
        say "ray $* $RAY_AUTH_MODE ${#RAY_AUTH_TOKEN}"
        trap 'say ray ended; exit 1' TERM
        if [ -e "$FOLDER/ray_hangs" ]; then trap 'say ray told to end' TERM; fi
        echo $$ >>"$FOLDER/ray_pids"
        echo >>"$FOLDER/ray_started"
        while :; do sleep 0.05; done""",
    "quatro-ray": """
        say "quatro-ray $* $RAY_ADDRESS"
        trap 'sleep 0.3; say driver wrote a checkpoint; exit 143' TERM
        touch "$FOLDER/started"
        until [ -e "$FOLDER/status_of_driver" ]; do sleep 0.05; done
        exit "$(cat "$FOLDER/status_of_driver")" """,
    "srun": """
        say "srun $*"
        while [ "${1#--}" != "$1" ]; do shift; done
        exec "$@" """,
    "scontrol": 'say "scontrol $*"',
}


class Job:
    """The script as Slurm would run it, with stand-ins for what it calls."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        for name, body in STAND_INS.items():
            path = folder / "bin" / name
            path.write_text(f'#!/bin/sh\nsay() {{ echo "$*" >>"$FOLDER/calls"; }}\n{body}\n')
            path.chmod(0o755)
        self.process: subprocess.Popen[str] | None = None
        self.script = SCRIPT

    def shorten(self, **seconds: int) -> None:
        """Run a copy of the script that has these deadlines."""
        text = SCRIPT.read_text()
        for name, value in seconds.items():
            text, num_found = re.subn(rf"^{name}=\d+$", f"{name}={value}", text, flags=re.MULTILINE)
            assert num_found == 1, name
        self.script = self.folder / "train.sh"
        self.script.write_text(text)
        self.script.chmod(0o755)

    def start(self, *arguments: str, num_nodes: int = 1, num_cpus_joined: int | None = None) -> None:
        if num_cpus_joined is not None:
            (self.folder / "status").write_text(f" 0.0/{num_cpus_joined}.0 CPU\n")
        environment = SLURM | {
            "PATH": f"{self.folder / 'bin'}:/usr/bin:/bin",
            "FOLDER": str(self.folder),
            "SLURM_JOB_NUM_NODES": str(num_nodes),
            "NUM_STARTS": str(min(num_nodes, 2)),  # the stand-in for srun starts one process for all other nodes
            "HEAD_ADDRESS": "10.0.0.1",
        }
        self.process = subprocess.Popen(
            [self.script, *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def wait_for(self, name: str) -> None:
        deadline = time.monotonic() + 60
        while not (self.folder / name).exists():
            assert time.monotonic() < deadline, self.calls()
            time.sleep(0.02)

    def signal(self, number: signal.Signals = signal.SIGUSR1) -> None:
        """What `--signal=B:USR1` and `scancel --batch` do: the batch script alone gets it."""
        assert self.process is not None
        self.process.send_signal(number)

    def end(self) -> int:
        assert self.process is not None
        return self.process.wait(timeout=60)

    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    job = Job(tmp_path)
    yield job
    if job.process is not None and job.process.poll() is None:
        os.killpg(job.process.pid, signal.SIGKILL)  # the stand-ins too


def test_before_the_time_limit_the_driver_is_told_first_and_the_job_is_queued_again(job: Job) -> None:
    job.start(CONFIG, "run.num_steps=5", num_cpus_joined=4)
    job.wait_for("started")
    job.signal()
    assert job.end() == 143
    head, driver, *rest = job.calls()
    assert head.startswith("ray start --head --node-ip-address=10.0.0.1 --port=6379 --include-dashboard=false --block")
    assert head.endswith("--num-cpus=4 --num-gpus=8 token 64")
    assert driver == (
        "quatro-ray train configs/demo.yaml checkpoint.grace_s=300 run.resume=auto run.num_steps=5 10.0.0.1:6379"
    )
    assert rest == ["driver wrote a checkpoint", "ray ended", "scontrol requeue 17"]


def test_a_job_that_is_cancelled_leaves_a_checkpoint_and_is_not_queued_again(job: Job) -> None:
    job.start(CONFIG, num_cpus_joined=4)
    job.wait_for("started")
    job.signal(signal.SIGTERM)
    assert job.end() == 143
    assert job.calls()[-2:] == ["driver wrote a checkpoint", "ray ended"]


@pytest.mark.parametrize("status", [0, 1])
def test_a_run_that_ends_by_itself_is_not_queued_again(job: Job, status: int) -> None:
    (job.folder / "status_of_driver").write_text(str(status))
    job.start(CONFIG, num_cpus_joined=4)
    assert job.end() == status
    assert job.calls()[-1] == "ray ended"


def test_a_run_that_is_complete_when_the_signal_comes_is_not_queued_again(job: Job) -> None:
    quatro_ray = job.folder / "bin/quatro-ray"
    quatro_ray.write_text(quatro_ray.read_text().replace("exit 143", "exit 0"))
    job.start(CONFIG, num_cpus_joined=4)
    job.wait_for("started")
    job.signal()
    assert job.end() == 0
    assert job.calls()[-1] == "ray ended"


def test_a_signal_while_ray_starts(job: Job) -> None:
    job.start(CONFIG)
    job.wait_for("ray_started")
    job.signal()
    assert job.end() == 143
    assert not any(call.startswith("quatro-ray") for call in job.calls())
    assert job.calls()[-2:] == ["ray ended", "scontrol requeue 17"]


def test_the_run_waits_for_all_nodes(job: Job) -> None:
    job.start(CONFIG, num_nodes=3, num_cpus_joined=4)
    time.sleep(1.5)  # the first look at the status, which shows one node
    assert not (job.folder / "started").exists()
    (job.folder / "status").write_text(" 0.0/12.0 CPU\n")
    job.wait_for("started")
    (srun,) = (call for call in job.calls() if call.startswith("srun"))
    assert "--nodes=2 --ntasks=2 --ntasks-per-node=1 --exclude=node1 --cpus-per-task=4 ray start" in srun
    assert "--address=10.0.0.1:6379" in srun
    job.signal()
    assert job.end() == 143
    assert job.calls().count("ray ended") == 2


def test_ray_that_does_not_start_ends_the_job(job: Job) -> None:
    (job.folder / "bin/ray").write_text("#!/bin/sh\nexit 1\n")
    job.start(CONFIG)
    assert job.end() == 1
    assert job.process is not None and job.process.stdout is not None
    assert "Ray did not start on 1 nodes with 4 CPUs" in job.process.stdout.read()
    assert job.calls() == []


def test_a_question_about_ray_that_hangs_is_asked_again(job: Job) -> None:
    job.shorten(status_deadline_s=1)
    (job.folder / "status_hangs").touch()
    (job.folder / "status_of_driver").write_text("0")
    job.start(CONFIG, num_cpus_joined=4)
    job.wait_for("started")
    assert (job.folder / "status_hung").exists()
    assert job.end() == 0


def test_ray_that_does_not_end_is_killed_and_the_job_is_queued_again(job: Job) -> None:
    job.shorten(end_deadline_s=1)
    (job.folder / "ray_hangs").touch()
    job.start(CONFIG, num_nodes=2, num_cpus_joined=8)
    job.wait_for("started")
    job.signal()
    assert job.end() == 143
    assert job.calls()[-3:] == ["ray told to end", "ray told to end", "scontrol requeue 17"]
    pids = [int(pid) for pid in (job.folder / "ray_pids").read_text().split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 60
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, pids
        time.sleep(0.02)
    assert job.process is not None and job.process.stdout is not None
    assert "Ray did not end within 1 s; it is killed" in job.process.stdout.read()


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_without_a_config_there_is_a_hint(job: Job) -> None:
    job.start()
    assert job.end() == 2
    assert job.process is not None and job.process.stdout is not None
    assert job.process.stdout.read().startswith("usage: sbatch deploy/slurm/train.sh CONFIG.yaml")


def options() -> dict[str, str]:
    lines = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", SCRIPT.read_text(), re.MULTILINE)
    return dict(lines)


def test_slurm_signals_the_script_alone_and_early_enough() -> None:
    lead = re.fullmatch(r"B:USR1@(\d+)", options()["signal"])
    assert lead and {"requeue", "exclusive"} <= set(options())
    grace = re.search(r"checkpoint\.grace_s=\d+", SCRIPT.read_text())
    ray = re.search(r"^end_deadline_s=(\d+)$", SCRIPT.read_text(), re.MULTILINE)
    assert grace and ray
    config = load_config(ROOT / CONFIG, [grace[0], "run.overwrite=false", "run.resume=auto"])
    assert int(lead[1]) >= config.checkpoint.grace_s + cluster._SHUTDOWN_S + int(ray[1])


def test_the_script_is_correct_bash() -> None:
    assert subprocess.run(["bash", "-n", SCRIPT], capture_output=True, timeout=60).stderr == b""
    checked = subprocess.run([BIN / "shellcheck", SCRIPT], capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout
