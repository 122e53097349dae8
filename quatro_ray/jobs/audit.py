"""The audit of a run from its files alone: whether every group, step and version is there once, and what was dropped.

The run may be finished, running or crashed. Nothing is written, and a run in progress is not disturbed. Its records are
read before its ledger, which is therefore never behind them (jobs/audit_checks.py).
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quatro_ray.engines.checkpoint_store import LEDGER
from quatro_ray.jobs.audit_checks import Books, Record, check
from quatro_ray.jobs.audit_files import checkpoints_of, lost_checkpoints, lost_rollouts, versions_of
from quatro_ray.jobs.run_directory import is_in_use
from quatro_ray.jobs.run_settings import read_settings
from quatro_ray.replay.ledger_reader import LedgerRows, check_host, read_rows
from quatro_ray.replay.schema import damage_of
from quatro_ray.telemetry.record_types import weighted_mean, wrong_types
from quatro_ray.telemetry.run_files import read_records, require_run
from quatro_ray.types import DropReason, GroupState

_LENGTH, _PASS_RATE = "response_tokens_mean", "pass_rate"
_KEPT = (
    {"step", "rollout/num", f"rollout/{_LENGTH}", "pass_rate/mean", "group_id", "set"}
    | {"event", "part", "version", "why", "path", "checkpoint"}
    | {f"drops/{reason}{suffix}" for reason in DropReason for suffix in ("", f"_{_LENGTH}", f"_{_PASS_RATE}")}
)
"""The fields that are read, so that a long run fits in memory."""


@dataclass(frozen=True)
class Fate:
    """Groups that ended in the same way, with means over the steps that metrics.jsonl has.

    Attributes:
        num_groups: number of groups in the ledger.
        response_tokens: mean length of their responses in tokens; None if it is not known.
        pass_rate: share of correct responses; None if they were not scored.
    """

    num_groups: int
    response_tokens: float | None
    pass_rate: float | None


@dataclass(frozen=True)
class Audit:
    """The result of an audit.

    Attributes:
        state: "finished", "running" or "not finished".
        step: optimiser steps of the newest version.
        num_steps: optimiser steps of the whole run.
        version: the newest version.
        groups: number of groups by state.
        trained: the trained groups.
        dropped: the dropped groups by reason.
        checkpoint_dir: folder of the checkpoints.
        checkpoints: steps of those of them whose files are as in their manifests.
        is_thorough: their contents were compared, not only sizes.
        num_compared: steps whose records were compared with the ledger.
        findings: by check; empty if nothing is lost, doubled or inconsistent.
    """

    run_dir: Path
    state: str
    step: int
    num_steps: int
    version: int
    groups: Mapping[str, int]
    trained: Fate
    dropped: Mapping[str, Fate]
    checkpoint_dir: Path
    checkpoints: Sequence[int]
    is_thorough: bool
    num_compared: int
    findings: Mapping[str, Sequence[str]]

    def record(self) -> dict[str, Any]:
        """Return the result as a JSON object."""
        own = vars(self) | {"run_dir": str(self.run_dir), "checkpoint_dir": str(self.checkpoint_dir)}
        own |= {"trained": vars(self.trained)}
        return own | {"dropped": {k: vars(v) for k, v in self.dropped.items()}, "is_clean": not self.findings}


def audit_run(run_dir: Path, *, thorough: bool = False) -> Audit:
    """Audit a run.

    Args:
        run_dir: directory of the run.
        thorough: also compare the SHA-256 of every file of the checkpoints, and the checksums of stored rollouts.

    Raises:
        ConfigError: the directory holds no run, or one without its configuration; or its checkpoints cannot be listed.
        LedgerError: the ledger is of another version, is in use on another machine, or cannot be read for another
            reason than damage.
    """
    require_run(run_dir)
    settings = read_settings(run_dir)
    was_running = is_in_use(run_dir)
    if was_running:
        check_host(run_dir / LEDGER)
    lines: dict[str, list[Record]] = {}
    findings: dict[str, list[str]] = {}
    summary, findings["summary.json"] = _summary(run_dir / "summary.json")
    for name in ("events.jsonl", "metrics.jsonl", "rollouts.jsonl", "evaluations.jsonl"):
        lines[name], findings[name] = _lines(run_dir / name)
    checkpoints, findings["checkpoints"] = checkpoints_of(settings, thorough=thorough)
    ledger, findings["ledger"] = _ledger(run_dir / LEDGER)
    if not (ledger.versions or findings["ledger"]) and lines["metrics.jsonl"]:
        findings["ledger"] = [f"{LEDGER} is missing or empty, and metrics.jsonl has steps"]
    is_running = was_running or is_in_use(run_dir)
    is_finished = not is_running and summary.get("learner_steps") == settings.num_steps
    is_constant = _is_constant(run_dir, lines["events.jsonl"])
    books = Books(
        ledger,
        metrics=lines["metrics.jsonl"],
        rollouts=lines["rollouts.jsonl"],
        evaluations=lines["evaluations.jsonl"],
        events=lines["events.jsonl"],
        summary=summary,
        num_steps=settings.num_steps,
        groups_per_step=settings.groups_per_step,
        max_staleness=settings.max_staleness if is_constant else None,
        rollouts_per_step=settings.rollouts_per_step if is_constant else None,
        is_finished=is_finished,
        is_running=is_running,
        evaluated_steps=settings.evaluated_steps if is_finished and is_constant else frozenset(),
    )
    if ledger.versions or not findings["ledger"]:  # what is damaged beyond reading has nothing to compare with
        findings |= check(books)
        findings["checkpoints"] += versions_of(checkpoints, ledger)
        findings["checkpoints"] += lost_checkpoints(run_dir, settings, books, is_constant)
    if not findings["ledger"]:
        findings["stored"] += lost_rollouts(run_dir, settings, books, checkpoints, is_constant, thorough=thorough)
    dropped = Counter(str(g.reason) for g in ledger.groups if g.state == GroupState.DROPPED)
    states = Counter(str(g.state) for g in ledger.groups)
    return Audit(
        run_dir=run_dir,
        state="running" if is_running else "finished" if is_finished else "not finished",
        step=ledger.step,
        num_steps=settings.num_steps,
        version=max((v.version for v in ledger.versions), default=0),
        groups=dict(states),
        trained=_trained(states[GroupState.TRAINED], books.metrics),
        dropped={reason: _dropped(reason, num, books.metrics) for reason, num in sorted(dropped.items())},
        checkpoint_dir=settings.checkpoints,
        checkpoints=sorted(checkpoints),
        is_thorough=thorough,
        num_compared=books.num_comparable,
        findings={name: found for name, found in findings.items() if found},
    )


def _lines(path: Path) -> tuple[list[Record], list[str]]:
    """Return the lines of a file of records, without what is not needed, and what is wrong with them."""
    unreadable = Counter[str]()
    lines: list[Record] = [{k: v for k, v in record.items() if k in _KEPT} for record in read_records(path, unreadable)]
    num = unreadable[path.name]
    return lines, [f"{path.name}: {num} lines cannot be read"] if num else []


def _ledger(path: Path) -> tuple[LedgerRows, list[str]]:
    """Return the ledger as it is now, and what is damaged; no rows if it cannot be read at all."""
    try:
        rows, broken = read_rows(path), ""
    except (sqlite3.DatabaseError, UnicodeDecodeError, TypeError) as error:  # TypeError: a text that was a number
        rows, broken = LedgerRows(), str(error)
    damage = damage_of(path) if rows.versions or broken else None
    what = damage or broken
    return rows, [f"{path.name} is damaged: {what}; docs/recovery.md says what takes its place"] if what else []


def _summary(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the content of summary.json, empty if there is none, and what is wrong with it."""
    if not path.is_file():
        return {}, []
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        summary = None
    if not isinstance(summary, dict):
        return {}, [f"{path.name} is not a JSON object"]
    wrong = [f"{path.name}: {what}" for what in wrong_types(path.name, summary)]
    return {} if wrong else summary, wrong


def _is_constant(run_dir: Path, events: Sequence[Record]) -> bool:
    """Return whether the whole run had the settings that it has now: a run that is resumed may change them."""
    if any(e["event"] == "fell_back" and e.get("why") == "resumed" for e in events):
        return False
    recorded, configured = run_dir / "metrics.jsonl", run_dir / "config.yaml"
    return recorded.is_file() and recorded.stat().st_mtime >= configured.stat().st_mtime  # else it is resumed now


def _trained(num_groups: int, metrics: Sequence[Record]) -> Fate:
    return _fate(num_groups, metrics, "rollout/num", f"rollout/{_LENGTH}", "pass_rate/mean")


def _dropped(reason: str, num_groups: int, metrics: Sequence[Record]) -> Fate:
    key = f"drops/{reason}"
    return _fate(num_groups, metrics, key, f"{key}_{_LENGTH}", f"{key}_{_PASS_RATE}")


def _fate(num_groups: int, metrics: Sequence[Record], weight: str, length: str, pass_rate: str) -> Fate:
    return Fate(num_groups, weighted_mean(metrics, length, weight), weighted_mean(metrics, pass_rate, weight))
