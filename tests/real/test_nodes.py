"""A machine of the cluster disappears: training goes on with what is left, and takes in what comes."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.make import config_tree
from tests.real.nodes import Head, kill, ray_head
from tests.real.training import Training


@dataclass
class TwoNodes:
    """A run of two engines. Only one of them fits onto the head; the other lives on `node`, a node of its own.

    Two processes of Ray's (2.60) keep two cores busy once a node has gone, so that the deadlines are wide.
    """

    run: Training
    head: Head
    node: subprocess.Popen[bytes]
    add_node: Callable[[], object]

    def announce_the_end_of_the_node(self) -> None:
        """As an autoscaler or a preemption with notice does. A checkpoint is written, and its engine gets no groups."""
        address = f"127.0.0.1:{self.head.port}"
        shown = "print(*(n['NodeID'] for n in ray.nodes() if n['Resources']['CPU'] == 2))"
        found = self.head.python("-c", f"import ray; ray.init('{address}'); {shown}")
        told = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test"]
        told += ["--deadline-remaining-seconds", "600"]
        drained = self.head.ray("drain-node", "--address", address, "--node-id", found.stdout.strip(), *told)
        assert drained.returncode == 0, found.stderr + drained.stderr
        self.run.wait_for_event("draining")
        (event,) = [e for e in self.run.lines("events.jsonl") if e["event"] == "draining"]
        assert len(event["engines"]) == 1
        self.run.wait_for_event("written", "checkpoint")

    def lose_the_node(self, *, steps: int) -> None:
        """Training goes on with the engine of the head alone."""
        run = self.run
        kill(self.node)
        run.wait_until(lambda: bool(run.down()))
        # the other may be lost with it, where a weight update was under way, and comes back
        run.wait_until(lambda: len(run.down()) == 1)
        run.wait_for_steps(steps)
        (gone,) = run.down()
        assert gone.startswith("generator")

    def end(self) -> None:
        self.run.process.send_signal(signal.SIGTERM)
        assert self.run.process.wait(timeout=240) == 128 + signal.SIGTERM, self.run.log.read_text()


def tree(folder: Path, model: str, head: Head, **generator: int) -> dict[str, Any]:
    """An engine takes two CPUs: one fits onto the head, and each further one needs a node of its own."""
    return config_tree(
        folder / "run",
        model={"kind": "pretrained", "path": model},
        run={"num_steps": 100_000},
        generator={"max_engines_lost": 5, "start_deadline_s": 240, **generator},
        cluster={"address": f"127.0.0.1:{head.port}", "cpus_per_engine": 2, "liveness_deadline_s": 20},
    )


@contextmanager
def two_nodes(model: str, folder: Path) -> Iterator[TwoNodes]:
    with ray_head(folder, num_cpus=3, is_alone=False) as head:
        joined = (f"--address=127.0.0.1:{head.port}", "--num-cpus=2")
        node = head.add_node(*joined)
        head.wait_for("status", f"--address=127.0.0.1:{head.port}", says="/5.0 CPU")
        made = tree(folder, model, head, num_engines=2)
        with Training(made, head.environment, folder) as run:
            yield TwoNodes(run, head, node, lambda: head.add_node(*joined))


def test_training_goes_on_without_a_node_that_disappears(warm_model_path: str, tmp_path: Path) -> None:
    with two_nodes(warm_model_path, tmp_path) as nodes:
        nodes.run.wait_for_steps(2)
        nodes.announce_the_end_of_the_node()
        nodes.lose_the_node(steps=2)
        nodes.end()


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_an_engine_joins_with_a_node_leaves_with_it_and_joins_with_another(
    warm_model_path: str, tmp_path: Path
) -> None:
    with ray_head(tmp_path, num_cpus=3, is_alone=False) as head:
        joined = (f"--address=127.0.0.1:{head.port}", "--num-cpus=2")
        made = tree(tmp_path, warm_model_path, head, num_engines=1, max_engines=2)
        with Training(made, head.environment, tmp_path) as run:
            run.wait_for_steps(2)
            assert run.lines("metrics.jsonl")[-1]["health/engines"] == 1
            node = head.add_node(*joined)
            run.wait_for_event("joined", "generator 1")
            run.wait_for_steps()
            assert run.lines("metrics.jsonl")[-1]["health/engines"] == 2
            kill(node)
            run.wait_until(lambda: "generator 1" in run.down())
            run.wait_for_steps()
            head.add_node(*joined)
            run.wait_until(lambda: not run.down())
            run.wait_for_steps()
            assert run.lines("metrics.jsonl")[-1]["health/engines"] == 2
            assert not [e for e in run.lines("events.jsonl") if e["event"] == "given_up"]
            run.process.send_signal(signal.SIGTERM)
            assert run.process.wait(timeout=240) == 128 + signal.SIGTERM, run.log.read_text()


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_node_that_disappears_is_replaced(warm_model_path: str, tmp_path: Path) -> None:
    """By another, on which the engine that was lost starts again."""
    with two_nodes(warm_model_path, tmp_path) as nodes:
        run = nodes.run
        run.wait_for_steps()
        nodes.lose_the_node(steps=4)

        nodes.add_node()
        run.wait_until(lambda: not run.down())
        run.wait_for_steps()
        assert run.lines("metrics.jsonl")[-1]["health/engines"] == 2
        nodes.end()
