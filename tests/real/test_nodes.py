"""A machine of the cluster disappears: training goes on with what is left, and takes in what comes."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.make import config_tree
from tests.real.nodes import BIN, kill, ray_head

pytestmark = pytest.mark.slow


class Training:
    """`quatro-ray train` in a process of its own, seen by its files."""

    def __init__(self, tree: dict[str, Any], environment: dict[str, str], folder: Path) -> None:
        self.run, self.log = Path(tree["run"]["dir"]), folder / "train.log"
        (folder / "config.yaml").write_text(yaml.safe_dump(tree))
        command = [str(BIN / "quatro-ray"), "train", str(folder / "config.yaml")]
        with self.log.open("w") as out:
            self.process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)

    def lines(self, name: str) -> list[dict[str, Any]]:
        path = self.run / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(timeout=30)

    def down(self) -> set[str]:
        """Parts that were lost and have not recovered."""
        parts: set[str] = set()
        for event in self.lines("events.jsonl"):
            if event["event"] == "lost":
                parts.add(event["part"])
            elif event["event"] == "recovered":
                parts.discard(event["part"])
        return parts

    def wait_until(self, holds: Callable[[], bool], seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.5)

    def wait_for_steps(self, more: int = 4) -> None:
        now = len(self.lines("metrics.jsonl"))
        self.wait_until(lambda: len(self.lines("metrics.jsonl")) >= now + more)


def test_a_node_that_disappears(warm_model_path: str, tmp_path: Path) -> None:
    """Only one of two engines fits onto the head; the other lives on a node of its own, which is killed and replaced.

    Meanwhile two processes of Ray's (2.60) keep two cores busy, so that the deadlines are wide.
    """
    with ray_head(tmp_path, num_cpus=3, is_alone=False) as head:
        joined = (f"--address=127.0.0.1:{head.port}", "--num-cpus=2")
        node = head.add_node(*joined)
        head.wait_for("status", f"--address=127.0.0.1:{head.port}", says="/5.0 CPU")
        tree = config_tree(
            tmp_path / "run",
            model={"kind": "pretrained", "path": warm_model_path},
            run={"num_steps": 100_000},
            generator={"num_engines": 2, "max_engines_lost": 5, "start_deadline_s": 240},
            cluster={"address": f"127.0.0.1:{head.port}", "cpus_per_engine": 2, "liveness_deadline_s": 20},
        )
        with Training(tree, head.environment, tmp_path) as run:
            run.wait_for_steps()

            kill(node)
            run.wait_until(lambda: bool(run.down()))
            # the other may be lost with it, where a weight update was under way, and comes back
            run.wait_until(lambda: len(run.down()) == 1)
            run.wait_for_steps()  # on the head alone
            (gone,) = run.down()
            assert gone.startswith("generator")

            head.add_node(*joined)
            run.wait_until(lambda: not run.down())
            run.wait_for_steps()
            assert run.lines("metrics.jsonl")[-1]["health/engines"] == 2

            run.process.send_signal(signal.SIGTERM)
            assert run.process.wait(timeout=120) == 128 + signal.SIGTERM, run.log.read_text()
