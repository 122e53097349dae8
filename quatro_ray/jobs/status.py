"""The state of a run from its files alone: what it does now, how fast it is, and when it will end. It needs no Ray."""

from __future__ import annotations

import sqlite3
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from quatro_ray.engines.checkpoint_store import LEDGER
from quatro_ray.errors import LedgerError
from quatro_ray.jobs.run_directory import is_in_use
from quatro_ray.jobs.run_settings import read_tree
from quatro_ray.replay.ledger_reader import LedgerTotals, check_host, read_totals
from quatro_ray.telemetry.activity import member_name
from quatro_ray.telemetry.append_log import last_lines
from quatro_ray.telemetry.now_file import Now, read_now
from quatro_ray.telemetry.record_types import MAX_CLOCK_S, number
from quatro_ray.telemetry.run_files import (
    Record,
    count_faults,
    faults,
    finite,
    last_records,
    newest_change,
    require_run,
)

NUM_STEPS = 20
"""The last steps, over which rates are means and the duration of a step is a median."""
ENDED = frozenset({"finished", "ended"})
"""The states of a run that is not in progress."""
RECENT_S = 600.0
"""Faults within so many seconds are shown one by one."""
_QUIET_S, _QUIET_STEPS = 60.0, 3.0
"""A run hangs if it recorded nothing for so long, and for so many times the duration of a step."""
_NUM_LOADS = 500
_LOCKED_S = 5.0


@dataclass(frozen=True)
class Member:
    """The state of one part of the run, such as an engine.

    Attributes:
        seconds: how long it has been in this state.
        num_running: groups that an engine generates; None for others, and for engines after the first 16.
        kv_cache_usage: share of an engine's key-value cache in use; None as for num_running.
    """

    name: str
    state: str
    seconds: float
    num_running: int | None
    kv_cache_usage: float | None


@dataclass(frozen=True)
class Pace:
    """Means over the last steps; None if the steps do not have the metric.

    Attributes:
        num_steps: number of these steps.
        step_s: median duration of a step in seconds.
        steps_per_min: steps a minute.
        trained_tokens_per_s: trained response tokens a second.
        generated_tokens_per_s: generated response tokens a second.
        reward: mean reward.
        staleness: mean age of the trained tokens in optimiser steps.
        max_staleness: the oldest token's age in optimiser steps.
    """

    num_steps: int
    step_s: float
    steps_per_min: float
    trained_tokens_per_s: float | None
    generated_tokens_per_s: float | None
    reward: float | None
    staleness: float | None
    max_staleness: float | None


@dataclass(frozen=True)
class Status:
    """The state of a run.

    Attributes:
        state: "running"; "hanging", if a process holds the directory and has recorded nothing for long; "finished"; or
            "ended", if no process holds it and steps are left.
        at: when the files were read, in seconds since the epoch.
        last_record_at: when the run last wrote a record, in seconds since the epoch; 0 if never.
        last_note: the last line of notes.log.
        step: the last recorded step.
        last_step_at: when it was recorded, in seconds since the epoch; None before the first step.
        num_steps: optimiser steps of the whole run; None if it is not known.
        version: the newest policy version; None if the ledger cannot be read, or is not there yet.
        groups: number of groups by state; those that are pending, ready or leased are the queues.
        drops: number of dropped groups by reason.
        ledger_problem: why the ledger cannot be read.
        doing: what each part does; after the death of the controller, what it did then.
        doing_at: when that was so, in seconds since the epoch; None if it is not known.
        pace: None before the first step.
        faults: number of faults since the run began, by component and event.
        recent_faults: the events of the last ten minutes, as in events.jsonl.
        end_at: estimated end of the last step, in seconds since the epoch; None unless the run is running.
        unreadable: number of lines that could not be read and are left out, by file; of long files, only the last lines
            are read.
    """

    run_dir: str
    state: str
    at: float
    last_record_at: float
    last_note: str
    step: int
    last_step_at: float | None
    num_steps: int | None
    version: int | None
    groups: Mapping[str, int]
    drops: Mapping[str, int]
    ledger_problem: str | None
    doing: Sequence[Member]
    doing_at: float | None
    pace: Pace | None
    faults: Mapping[str, int]
    recent_faults: Sequence[Record]
    end_at: float | None
    unreadable: Mapping[str, int]

    def record(self) -> dict[str, Any]:
        """Return the state as a JSON object, in which a number that is not finite is null."""
        found: dict[str, Any] = finite(asdict(self))
        return found


def read_status(run_dir: Path) -> Status:
    """Read the state of a run. Nothing is written, and the run is not disturbed.

    Raises:
        ConfigError: the directory holds no run, or its config.yaml is not YAML.
    """
    require_run(run_dir)
    at = time.time()
    run = read_tree(run_dir).get("run")
    steps = run.get("num_steps") if isinstance(run, dict) else None
    num_steps = steps if isinstance(steps, int) else None
    unreadable = Counter[str]()
    last = last_records(run_dir / "metrics.jsonl", NUM_STEPS, unreadable)
    step = last[-1]["step"] if last else 0
    last_step_at = (run_dir / "metrics.jsonl").stat().st_mtime if last else None
    pace, now, changed_at = _pace(last), read_now(run_dir), newest_change(run_dir)
    state = _state(run_dir, at - _last_sign(changed_at, now), pace, is_done=step == num_steps)
    totals, problem = _totals(run_dir / LEDGER, is_in_use=state not in ENDED)
    events = faults(run_dir, unreadable)
    doing = _doing(run_dir, now, at if state not in ENDED else None, unreadable)
    return Status(
        run_dir=str(run_dir),
        state=state,
        at=at,
        last_record_at=changed_at,
        last_note=next(iter(last_lines(run_dir / "notes.log", 1)), ""),
        step=step,
        last_step_at=last_step_at,
        num_steps=num_steps,
        version=totals.version if totals else None,
        groups=totals.groups if totals else {},
        drops=totals.drops if totals else {},
        ledger_problem=problem,
        doing=doing,
        doing_at=now.clock_s if now else None,
        pace=pace,
        faults=count_faults(events),
        recent_faults=[e for e in events if e.get("clock_s", 0.0) > at - RECENT_S],
        end_at=_end_at(at, last_step_at, num_steps, step, pace) if state == "running" else None,
        unreadable=dict(unreadable),
    )


def _totals(path: Path, *, is_in_use: bool) -> tuple[LedgerTotals | None, str | None]:
    try:
        if is_in_use:
            check_host(path)
        return read_totals(path, _LOCKED_S), None
    except (LedgerError, sqlite3.DatabaseError) as error:
        return None, str(error)


def _state(run_dir: Path, quiet_s: float, pace: Pace | None, *, is_done: bool) -> str:
    if not is_in_use(run_dir):
        return "finished" if is_done and (run_dir / "summary.json").is_file() else "ended"
    limit = max(_QUIET_S, _QUIET_STEPS * pace.step_s if pace else 0.0)
    return "hanging" if quiet_s > limit else "running"


def _last_sign(changed_at: float, now: Now | None) -> float:
    """Return when the run last wrote a record, or when one of its parts last began something else."""
    return max(
        [changed_at, *(since for members in (now.roles if now else {}).values() for _, since in members.values())]
    )


def _doing(run_dir: Path, now: Now | None, at: float | None, unreadable: Counter[str]) -> list[Member]:
    """Return what each part does at a time, or did when the file was written if `at` is None."""
    if now is None:
        return []
    records = last_records(run_dir / "timeline.jsonl", _NUM_LOADS, unreadable)
    loads = {r["role"]: r for r in records if "num_running" in r}
    doing = []
    for role, members in now.roles.items():
        for index, (state, since) in sorted(members.items()):
            name = member_name(role, index)
            load = loads.get(name, {})
            seconds = max(0.0, (now.clock_s if at is None else at) - since)
            doing.append(Member(name, state, seconds, load.get("num_running"), load.get("kv_cache_usage")))
    return doing


def _pace(steps: Sequence[Record]) -> Pace | None:
    """Return the pace of the steps that tell their duration; None if there are none."""
    timed = [m for m in steps if (number(m, "time/step_s") or 0.0) > 0.0]
    if not timed:
        return None
    seconds = sum(m["time/step_s"] for m in timed)
    rates = [(number(m, "throughput/generated_tokens_per_s"), m["time/step_s"]) for m in timed]
    return Pace(
        num_steps=len(timed),
        step_s=median(m["time/step_s"] for m in timed),
        steps_per_min=60.0 * len(timed) / seconds,
        trained_tokens_per_s=_over(seconds, _known(timed, "tokens/trained")),
        generated_tokens_per_s=_over(seconds, [rate * step_s for rate, step_s in rates if rate is not None]),
        reward=_mean(_known(timed, "reward/mean")),
        staleness=_mean(_known(timed, "off_policy/staleness_mean")),
        max_staleness=max(_known(timed, "off_policy/staleness_max"), default=None),
    )


def _known(steps: Sequence[Record], name: str) -> list[float]:
    return [value for m in steps if (value := number(m, name)) is not None]


def _over(seconds: float, amounts: Sequence[float]) -> float | None:
    return sum(amounts) / seconds if amounts else None


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None


def _end_at(at: float, last_step_at: float | None, num_steps: int | None, step: int, pace: Pace | None) -> float | None:
    """Return when the last step will end if each takes as long as the last ones did; None if that is not known."""
    if pace is None or last_step_at is None or num_steps is None or step >= num_steps:
        return None
    end_at = max(at, last_step_at + pace.step_s) + pace.step_s * (num_steps - step - 1)
    return end_at if end_at < MAX_CLOCK_S else None
