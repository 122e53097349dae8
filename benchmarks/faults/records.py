"""Reads the records of a run from another process while they grow: events, steps, phases."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_TAIL_BYTES = 2**19


class Lines:
    """JSON lines of a growing file; each call returns the new ones. Lines that were cut off are in `broken`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self.broken: list[str] = []

    def new(self) -> list[dict[str, Any]]:
        if not self._path.is_file():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        return [r for line in whole.decode().splitlines() if (r := self._read(line)) is not None]

    def _read(self, line: str) -> dict[str, Any] | None:
        try:
            return json.loads(line)
        except ValueError:
            self.broken.append(line)
            return None


class Steps:
    """The newest recorded optimiser step, and the latest time of any step so far.

    Lines are deleted when the learner falls back, so the step may decrease, but the times of new lines increase.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "metrics.jsonl"
        self._seen: tuple[int, int] | None = None
        self.step = 0
        self.newest_s = 0.0
        """Seconds since the run began."""

    def look(self) -> None:
        try:
            stat = self._path.stat()
        except FileNotFoundError:
            return
        if (seen := (stat.st_mtime_ns, stat.st_size)) == self._seen:
            return
        self._seen = seen
        if (line := _last_line(self._path)) is None:
            self.step = 0
            return
        self.step = line["step"]
        self.newest_s = max(self.newest_s, line["time_s"])


def _last_line(path: Path) -> dict[str, Any] | None:
    """Return the last complete line."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - _TAIL_BYTES))
        lines = file.read().rpartition(b"\n")[0].splitlines()
    return json.loads(lines[-1]) if lines else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    return Lines(path).new()


def read_json(path: Path) -> Mapping[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
