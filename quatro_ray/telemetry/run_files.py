"""Reads the files of a run for its report; the run may be finished, still running, or crashed."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from quatro_ray.errors import ConfigError
from quatro_ray.telemetry.append_log import earlier, last_lines
from quatro_ray.telemetry.record_types import parse

Record = dict[str, Any]
"""A line of a file of the run, which is JSON."""
FAULTS = frozenset({"lost", "given_up", "fell_back", "damaged", "failed", "restored"})
"""The events of events.jsonl that are faults, or what was done about one."""
_NUM_ROLLOUT_GROUPS = 3
_NUM_NOTES = 20
_NUM_TIMELINE = 10_000


@dataclass
class RunFiles:
    """The content of a run's directory.

    Attributes:
        summary: summary.json; None unless the run is finished. A resumed run has that of its earlier end, which does
            not count.
        timeline: the last records.
        rollouts: the last groups.
        notes: the last lines of notes.log.
        faults: the records of events.jsonl that are faults.
        changed_at: when the run last wrote a record, in seconds since the epoch.
        unreadable: number of lines that are no records, by file; an incomplete last line, which may be in the middle of
            being written, does not count.
    """

    name: str
    metrics: list[Record] = field(default_factory=list)
    evaluations: list[Record] = field(default_factory=list)
    timeline: list[Record] = field(default_factory=list)
    rollouts: list[Record] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    faults: list[Record] = field(default_factory=list)
    config: str = ""
    summary: Record | None = None
    changed_at: float = 0.0
    unreadable: Counter[str] = field(default_factory=Counter)

    @property
    def num_steps(self) -> int | None:
        """Steps of the whole run, as configured; None if config.yaml does not tell."""
        try:
            tree = yaml.safe_load(self.config)
        except (yaml.YAMLError, ValueError):  # ValueError: a date that does not exist
            return None
        run = tree.get("run") if isinstance(tree, dict) else None
        steps = run.get("num_steps") if isinstance(run, dict) else None
        return steps if isinstance(steps, int) else None

    @property
    def last_step(self) -> int:
        """The last step that is recorded; 0 before the first one."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0


def require_run(run_dir: Path) -> None:
    """Raise ConfigError if the directory holds no run."""
    if not any((run_dir / name).is_file() for name in ("config.yaml", "metrics.jsonl")):
        raise ConfigError(f"{run_dir}: holds no run, as it has no config.yaml; give the run.dir of a run")


def newest_change(run_dir: Path) -> float:
    """Return when a record of the run was last written, in seconds since the epoch; 0 if there is none."""
    files = [*run_dir.glob("*.jsonl"), run_dir / "notes.log", run_dir / "summary.json"]
    return max((f.stat().st_mtime for f in files if f.is_file()), default=0.0)


def read_run(run_dir: Path) -> RunFiles:
    """Read what there is. Missing files give empty lists; lines that cannot be read are left out and counted."""
    run = RunFiles(run_dir.name, changed_at=newest_change(run_dir))

    def records(name: str, last: int | None = None) -> Iterator[Record]:
        return read_records(run_dir / name, run.unreadable, last)

    run.metrics = list(records("metrics.jsonl"))
    run.evaluations = list(records("evaluations.jsonl"))
    run.timeline = list(records("timeline.jsonl", last=_NUM_TIMELINE))
    run.rollouts = list(records("rollouts.jsonl", last=_NUM_ROLLOUT_GROUPS))
    run.notes = list(deque(_lines(run_dir / "notes.log"), maxlen=_NUM_NOTES))
    run.faults = faults(run_dir, run.unreadable)
    run.config = "\n".join(_lines(run_dir / "config.yaml"))
    run.summary = _summary(run_dir / "summary.json", run)
    return run


def faults(run_dir: Path, unreadable: Counter[str]) -> list[Record]:
    """Return the records of events.jsonl that are faults; lines that cannot be read are counted in `unreadable`."""
    return [e for e in read_records(run_dir / "events.jsonl", unreadable) if e["event"] in FAULTS]


def count_faults(events: Iterable[Record]) -> dict[str, int]:
    """Return the number of faults by component and event, such as "generator lost"."""
    return dict(Counter(f"{e['part'].partition(' ')[0]} {e['event']}" for e in events))


def finite(value: Any) -> Any:
    """Return a JSON value with null in place of each number that JSON does not have: NaN and the infinities."""
    if isinstance(value, Mapping):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def records_of(run_dir: Path, name: str, unreadable: Counter[str]) -> Iterator[Record]:
    """Yield the records of a file of the run in order, those of its earlier part first; unreadable ones are left out.

    Args:
        run_dir: directory of the run.
        name: the file, such as "timeline.jsonl".
        unreadable: as `read_records` has it.
    """
    for path in (earlier(run_dir / name), run_dir / name):
        yield from read_records(path, unreadable)


def last_records(path: Path, num: int, unreadable: Counter[str]) -> list[Record]:
    """Return the records in the last lines of a file, the newest last; unreadable ones are left out.

    Args:
        path: the file, which may be large.
        num: number of lines.
        unreadable: as `read_records` has it.
    """
    return list(_parsed(last_lines(path, num), path.name, unreadable))


def _summary(path: Path, run: RunFiles) -> Record | None:
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8", errors="replace")
    summary = next(_parsed([text], path.name, run.unreadable), None)  # None: it is being written, or the disk was full
    if summary is None:
        return None
    return summary if summary.get("learner_steps", run.last_step) == run.last_step else None


def read_records(path: Path, unreadable: Counter[str], last: int | None = None) -> Iterator[Record]:
    """Yield the records of a file in order.

    Args:
        path: the file, which may still grow; none has no records.
        unreadable: lines that are not JSON objects, or have other types than the run writes, are added to it, under the
            name of the file.
        last: read only so many lines at the end; the others are not parsed, as the file may be large.
    """
    return _parsed(_lines(path) if last is None else deque(_lines(path), maxlen=last), path.name, unreadable)


def _parsed(lines: Iterable[str], name: str, unreadable: Counter[str]) -> Iterator[Record]:
    for line in lines:
        record = parse(name, line)
        if record is not None:
            yield record
        else:
            unreadable[name] += 1


def _lines(path: Path) -> Iterator[str]:
    """Yield the complete lines, without their ends; the file may still grow."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        yield from (line.rstrip("\n") for line in file if line.endswith("\n"))
