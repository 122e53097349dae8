"""A run of `quatro-ray train` in a process of its own, seen by its files."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tests.real.nodes import BIN


class Training:
    """`quatro-ray train` in a process of its own, seen by its files."""

    def __init__(
        self,
        tree: dict[str, Any],
        environment: dict[str, str],
        folder: Path,
        enter: Callable[..., list[str]] = lambda *command: list(command),
    ) -> None:
        """`enter` returns the command line that runs a command on the host of the driver."""
        self.run, self.log = Path(tree["run"]["dir"]), folder / "train.log"
        (folder / "config.yaml").write_text(yaml.safe_dump(tree))
        command = enter(str(BIN / "quatro-ray"), "train", str(folder / "config.yaml"))
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

    def wait_until(self, holds: Callable[[], bool], seconds: float = 480) -> None:
        deadline = time.monotonic() + seconds
        while not holds():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.5)

    def wait_for_event(self, event: str, part: str = "", seconds: float = 480) -> None:
        def has_happened() -> bool:
            return any(e["event"] == event and part in e["part"] for e in self.lines("events.jsonl"))

        self.wait_until(has_happened, seconds)

    def wait_for_steps(self, more: int = 4) -> None:
        now = len(self.lines("metrics.jsonl"))
        self.wait_until(lambda: len(self.lines("metrics.jsonl")) >= now + more)
