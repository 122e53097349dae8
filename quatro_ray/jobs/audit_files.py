"""The checks of an audit that look at files: the rollouts beside the ledger, and the checkpoints."""

from __future__ import annotations

import filecmp
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from quatro_ray.engines.checkpoint_store import LEDGER, CheckpointStore
from quatro_ray.errors import ConfigError
from quatro_ray.jobs.audit_checks import Books, Record, some
from quatro_ray.jobs.run_settings import RunSettings
from quatro_ray.replay.ledger_reader import LedgerRows, damaged_rollouts, trained_without_rollouts
from quatro_ray.telemetry.run_files import read_records


def lost_rollouts(
    run_dir: Path,
    settings: RunSettings,
    books: Books,
    checkpoints: Collection[int],
    is_constant: bool,
    *,
    thorough: bool,
) -> list[str]:
    """Check that the rollouts of every row of the ledger are on disk, and that those of the kept steps have rows.

    A kept step may have been chosen when its rollouts were gone already. They are required if the settings never
    changed, or if the checkpoint before the step is there, which is deleted before the rollouts are. They are not if
    the run has told that rollouts could not be read.

    Args:
        run_dir: directory of the run, whose ledger is whole.
        settings: its settings.
        books: its ledger and records.
        checkpoints: steps of the checkpoints that are there.
        is_constant: the whole run had these settings.
        thorough: compare checksums.
    """
    path = run_dir / LEDGER
    damaged = damaged_rollouts(path, thorough=thorough)
    found = [f"{what}; it holds the rollouts of groups {some(group_ids)}" for what, group_ids in damaged.items()]
    is_told = books.is_rewinding or any((e["event"], e["part"]) == ("damaged", "ledger") for e in books.events)
    for version, step in books.ledger.committed.items():
        is_required = step in settings.kept_steps and (is_constant or step - 1 in checkpoints)
        if is_required and not is_told and (lost := trained_without_rollouts(path, [version])):
            found.append(f"step {step} is in replay.keep_steps, and the rollouts of groups {some(lost)} are not stored")
    return [] if found and _is_restored(run_dir, settings) else found


def _is_restored(run_dir: Path, settings: RunSettings) -> bool:
    """Return whether a copy has taken the ledger's place, and its rollouts, which may be gone, were not checked yet."""
    told = [e["event"] for e in read_records(run_dir / "events.jsonl", Counter())]
    last = next((event for event in reversed(told) if event in ("fell_back", "restored")), None)
    log = run_dir / f"{LEDGER}-wal"
    is_opened = log.is_file() and log.stat().st_size > 0
    copies = [] if is_opened else settings.checkpoints.glob(f"step_*/{LEDGER}")
    return last == "restored" or any(filecmp.cmp(run_dir / LEDGER, copy, shallow=False) for copy in copies)


def checkpoints_of(settings: RunSettings, *, thorough: bool) -> tuple[dict[int, int | None], list[str]]:
    """Return the version of each complete checkpoint by its step, and what is damaged.

    Raises:
        ConfigError: the folder cannot be listed.
    """
    try:
        if settings.checkpoints.exists():
            os.listdir(settings.checkpoints)  # Path.glob takes a folder that it may not list for an empty one
    except OSError as error:
        raise ConfigError(
            f"checkpoint.dir={settings.checkpoints}: cannot be listed ({error}); make it readable"
        ) from error
    store = CheckpointStore(settings.checkpoints, settings.keep, {step - 1 for step in settings.kept_steps})
    steps = store.kept_steps()  # others are about to be deleted
    damaged = {step: what for step in steps if (what := store.damage_of(step, thorough=thorough))}
    return {s: store.version_of(s) for s in steps if s not in damaged}, [
        f"checkpoint step_{step}: {what}" for step, what in damaged.items()
    ]


def lost_checkpoints(run_dir: Path, settings: RunSettings, books: Books, is_constant: bool) -> list[str]:
    """Check that the newest checkpoint that was told as written is there, or a later one, and all pinned ones.

    A pinned one is required only if the settings never changed, no checkpoint was damaged, and no process runs.

    Args:
        run_dir: directory of the run.
        settings: its settings.
        books: its ledger and records.
        is_constant: the whole run had these settings.
    """
    if books.is_rewinding:  # a fall-back that is not told yet may have renamed it
        return []
    found = []
    newest = _newest_told(books.events)
    if newest is not None and not _has_trace_of(settings.checkpoints, newest, or_later=True):
        told = read_records(run_dir / "events.jsonl", Counter())  # again: a process may have replaced it since
        if _newest_told(list(told)) == newest:
            found.append(f"checkpoint step_{newest}: was written, and is missing")
    if is_constant and not books.is_running and not any(_is_about(e, "damaged") for e in books.events):
        written = {_step_of(e["path"]) for e in books.events if _is_about(e, "written") and "path" in e}
        for step in sorted({s - 1 for s in settings.kept_steps} & written - {newest}):
            if not _has_trace_of(settings.checkpoints, step, or_later=False):
                found.append(f"checkpoint step_{step}: was written, and is missing; replay.keep_steps keeps it")
    return found


def _newest_told(events: Sequence[Record]) -> int | None:
    """Return the step of the checkpoint that was written or loaded last; None if there is none, or one was damaged."""
    newest = None
    for event in events:
        if _is_about(event, "damaged"):
            newest = None
        elif _is_about(event, "written"):
            newest = _step_of(event.get("path"))
        elif event["event"] == "fell_back":
            newest = _step_of(event.get("checkpoint"))
    return newest


def _is_about(event: Record, what: str) -> bool:
    return (event["event"], event["part"]) == (what, "checkpoint")


def _step_of(name: object) -> int | None:
    number = str(name).removeprefix("step_")
    return int(number) if number.isdecimal() else None


def _has_trace_of(folder: Path, step: int, *, or_later: bool) -> bool:
    """Return whether a checkpoint is there, if only under the name of one that is damaged or being written again."""
    steps = CheckpointStore(folder, 0).steps()
    return step in steps or (or_later and max(steps, default=0) > step) or any(folder.glob(f"step_{step}.*"))


def versions_of(checkpoints: Mapping[int, int | None], ledger: LedgerRows) -> list[str]:
    """Check that the versions of checkpoints are those that the ledger has at their steps."""
    step_of = {v.version: v.step for v in ledger.versions}
    return [
        f"checkpoint step_{step}: is of version {version}, which the ledger does not have at that step"
        for step, version in checkpoints.items()
        if version is not None and step_of.get(version) != step
    ]
