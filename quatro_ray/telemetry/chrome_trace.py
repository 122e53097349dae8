"""The timeline of a run as a Chrome trace, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

The format is Google's Trace Event Format: "X" is a span, "C" a counter, "i" a point in time, "M" a name. Times are in
microseconds.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from quatro_ray.errors import ConfigError
from quatro_ray.telemetry.run_files import Record, records_of, require_run

_ROLES = ("controller", "learner", "generator", "verifier", "evaluator", "evaluation", "checkpoint", "export")
_COUNTERS = ("num_running", "kv_cache_usage")
Event = dict[str, Any]


def write_trace(run_dir: Path, unreadable: Counter[str], out: Path | None = None) -> Path:
    """Write the trace of a run, which may still be running; return its path.

    Args:
        run_dir: directory of the run.
        unreadable: lines that cannot be read, and are left out, are added to it by file.
        out: the file to write; by default trace.json in the run's directory.

    Raises:
        ConfigError: the directory holds no run, or `out` cannot be written.
    """
    require_run(run_dir)
    path = out or run_dir / "trace.json"
    writing = path.with_name(f"{path.name}.writing")
    try:
        with writing.open("w", encoding="utf-8") as file:
            file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
            for i, event in enumerate(_events(run_dir, unreadable)):
                file.write((",\n" if i else "") + json.dumps(event))
            file.write("\n]}\n")
        os.replace(writing, path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}; give another path with --out") from error
    return path


def _events(run_dir: Path, unreadable: Counter[str]) -> Iterator[Event]:
    named: set[str] = set()
    for part, events in _by_part(run_dir, unreadable):
        if part not in named:
            named.add(part)
            yield from _names(part)
        yield from events


def _by_part(run_dir: Path, unreadable: Counter[str]) -> Iterator[tuple[str, Iterable[Event]]]:
    """Yield events, and the part of the run that they are of."""
    for record in records_of(run_dir, "timeline.jsonl", unreadable):
        yield record["role"], _of_timeline(record)
    for record in records_of(run_dir, "events.jsonl", unreadable):
        part = record["part"]
        yield part, [_point(part, f"{part}: {record['event']}", record.get("time_s", 0.0), record)]
    for record in records_of(run_dir, "metrics.jsonl", unreadable):
        shown = {key: value for key, value in record.items() if isinstance(value, int | float)}
        yield "learner", [_point("learner", f"step {record['step']}", record.get("time_s", 0.0), shown)]


def _of_timeline(record: Record) -> Iterator[Event]:
    place = _place(record["role"])
    if "phase" in record:
        duration = _microseconds(record["end"] - record["start"])
        yield place | {"ph": "X", "name": record["phase"], "ts": _microseconds(record["start"]), "dur": duration}
        return
    for name in _COUNTERS:
        if name in record:
            label = f"{record['role']}: {name}"
            yield place | {"ph": "C", "name": label, "ts": _microseconds(record["t"]), "args": {name: record[name]}}


def _point(part: str, name: str, time_s: float, detail: Record) -> Event:
    # JSON has no number that is not finite
    shown = {key: value for key, value in detail.items() if not isinstance(value, float) or math.isfinite(value)}
    return _place(part) | {"ph": "i", "s": "t", "name": name, "ts": _microseconds(time_s), "args": shown}


def _names(part: str) -> Iterator[Event]:
    place = _place(part)
    yield place | {"ph": "M", "name": "process_name", "args": {"name": part.split()[0]}}
    yield place | {"ph": "M", "name": "thread_name", "args": {"name": part}}


def _place(part: str) -> Event:
    """Return process and thread: one process for each role, one thread for each of its members."""
    role, _, member = part.partition(" ")
    pid = _ROLES.index(role) if role in _ROLES else len(_ROLES)
    return {"pid": pid, "tid": int(member) if member.isdigit() else 0}


def _microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 1)
