"""Reads the ledger of a run from another process, which may be in use meanwhile."""

from __future__ import annotations

import socket
import sqlite3
import sys
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from quatro_ray.errors import LedgerError, LedgerUnreadable
from quatro_ray.files import replace_file
from quatro_ray.replay.schema import VERSION, read_only, tables_version
from quatro_ray.replay.segments import Location, Segments
from quatro_ray.types import GroupState

_HOST = ".host"
"""Suffix of the file that names the machine on which a ledger was opened last."""
_GROUPS = (
    "SELECT group_id, state, reason, learner_version, oldest_version, newest_version, num_tokens FROM groups "
    "ORDER BY group_id"
)
_VERSIONS = "SELECT version, parent, step, fell_back FROM versions ORDER BY version"


class GroupRow(NamedTuple):
    """A row of the ledger's table `groups`; replay/ledger.py:Entry describes the values."""

    group_id: int
    state: str
    reason: str | None
    learner_version: int | None
    oldest_version: int | None
    newest_version: int | None
    num_tokens: int | None


class VersionRow(NamedTuple):
    """A row of `versions`: one step from `parent`, or, if it fell back, the parent's weights under a new number."""

    version: int
    parent: int | None
    step: int
    fell_back: bool


@dataclass(frozen=True)
class LedgerRows:
    """One snapshot of the ledger.

    Attributes:
        groups: in the order of their ids.
        versions: in the order of their numbers.
        without_query: pending groups whose query is not stored, so that they cannot be generated.
        without_rollouts: ready and leased groups whose rollouts are not stored, so that they cannot be trained.
        without_group: ids of queries that no group has.
    """

    groups: tuple[GroupRow, ...] = ()
    versions: tuple[VersionRow, ...] = ()
    without_query: tuple[int, ...] = ()
    without_rollouts: tuple[int, ...] = ()
    without_group: tuple[int, ...] = ()

    @cached_property
    def lineage(self) -> tuple[VersionRow, ...]:
        """The versions from the starting policy to the newest one, without abandoned branches."""
        by_number = {v.version: v for v in self.versions}
        lineage: list[VersionRow] = []
        at = max(by_number, default=None)
        while at is not None and at in by_number and len(lineage) <= len(by_number):
            lineage.append(by_number[at])
            at = by_number[at].parent
        return tuple(lineage[::-1])

    @property
    def step(self) -> int:
        """Optimiser steps of the newest version; 0 if there is none."""
        return self.lineage[-1].step if self.lineage else 0

    @cached_property
    def committed(self) -> dict[int, int]:
        """Each version from which a step of the lineage was made, with the number of that step, from 1."""
        return {v.parent: v.step for v in self.lineage if not v.fell_back and v.parent is not None}

    @cached_property
    def trained(self) -> dict[int, int]:
        """Each trained group, with the version from which its step was made."""
        return {
            g.group_id: g.learner_version
            for g in self.groups
            if g.state == GroupState.TRAINED and g.learner_version is not None
        }


@dataclass(frozen=True)
class LedgerTotals:
    """The totals that the ledger keeps, which take the same time to read however many groups there are.

    Attributes:
        groups: number of groups by state.
        drops: number of dropped groups by reason.
        version: the newest version.
        step: optimiser steps of that version.
    """

    groups: dict[str, int]
    drops: dict[str, int]
    version: int
    step: int


def tell_host(path: Path) -> None:
    """Tell readers that the ledger is in use on this machine."""
    file = path.with_suffix(_HOST)
    if not file.is_file() or file.read_text() != socket.gethostname():
        replace_file(file, socket.gethostname())


def check_host(path: Path) -> None:
    """Raise LedgerUnreadable if a ledger that is in use was opened on another machine.

    SQLite's log has an index in shared memory. A reader on another machine has its own view of that file, and could
    change it under the writer.
    """
    file = path.with_suffix(_HOST)
    if file.is_file() and (host := file.read_text()) != socket.gethostname():
        raise LedgerUnreadable(f"{path} is in use on {host}, and can be read only there until the run has ended")


def read_rows(path: Path) -> LedgerRows:
    """Read the whole ledger as it is at one moment; no rows if the file does not exist or has no tables yet.

    Raises:
        LedgerError: it is of another version.
        LedgerUnreadable: it cannot be read, for example because another program has locked it.
        sqlite3.DatabaseError: it is damaged.
    """
    if not path.is_file():
        return LedgerRows()
    with read_only(path) as db:
        db.execute("BEGIN")
        version = tables_version(db)
        if version is None:
            return LedgerRows()
        _check_version(path, version)
        intern = sys.intern  # a row would have a text of its own for its state
        groups = tuple(GroupRow(i, intern(state), *rest) for i, state, *rest in db.execute(_GROUPS))
        versions = tuple(VersionRow(v, parent, step, bool(f)) for v, parent, step, f in db.execute(_VERSIONS))
        without_rollouts = [*_without(db, "rollouts", GroupState.READY), *_without(db, "rollouts", GroupState.LEASED)]
        orphans = db.execute("SELECT group_id FROM queries EXCEPT SELECT group_id FROM groups ORDER BY group_id")
        return LedgerRows(
            groups,
            versions,
            tuple(_without(db, "queries", GroupState.PENDING)),
            tuple(sorted(without_rollouts)),
            tuple(group_id for (group_id,) in orphans),
        )


def _check_version(path: Path, version: int) -> None:
    if version != VERSION:
        raise LedgerError(
            f"{path} is a ledger of version {version}, and this quatro_ray reads version {VERSION}; use the "
            "quatro_ray that wrote it"
        )


def _without(db: sqlite3.Connection, table: str, state: GroupState) -> list[int]:
    """Return the groups in a state that have no row in another table. The state is no parameter, for its index."""
    rows = db.execute(
        f"SELECT group_id FROM groups WHERE state = '{state}' AND NOT EXISTS "
        f"(SELECT 1 FROM {table} WHERE {table}.group_id = groups.group_id) ORDER BY group_id"
    )
    return [group_id for (group_id,) in rows]


def trained_without_rollouts(path: Path, learner_versions: Collection[int]) -> list[int]:
    """Return the groups trained from these versions whose rollouts are not stored."""
    if not (learner_versions and path.is_file()):
        return []
    with read_only(path) as db:
        rows = db.execute(
            f"SELECT group_id FROM groups WHERE learner_version IN ({', '.join(map(str, sorted(learner_versions)))}) "
            f"AND state = '{GroupState.TRAINED}' "
            "AND NOT EXISTS (SELECT 1 FROM rollouts WHERE rollouts.group_id = groups.group_id) ORDER BY group_id"
        )
        return [group_id for (group_id,) in rows]


def damaged_rollouts(path: Path, *, thorough: bool) -> dict[str, list[int]]:
    """Look for the rollouts of every row in the segments beside the ledger.

    A process that writes to the ledger deletes rows before it deletes their segment. What is missing is therefore
    looked up again, and is no damage if its row is gone.

    Args:
        path: file of the ledger.
        thorough: compare the checksums too, not only the sizes of the segments.

    Returns:
        The groups whose rollouts are not there, by what is wrong.
    """
    folder = path.with_suffix(".rollouts")
    suspects = {i: at for i, at in _locations(path).items() if _damage(folder, at, thorough=thorough)}
    damaged: defaultdict[str, list[int]] = defaultdict(list)
    if suspects:
        now = _locations(path)
        for group_id, at in suspects.items():
            if now.get(group_id) == at and (what := _damage(folder, at, thorough=thorough)):
                damaged[what].append(group_id)
    return damaged


def _locations(path: Path) -> dict[int, Location]:
    """Return where the rollouts of each group are; nothing if there is no ledger, or one of another version."""
    if not path.is_file():
        return {}
    with read_only(path) as db:
        db.execute("BEGIN")
        if tables_version(db) != VERSION:
            return {}
        rows = db.execute("SELECT group_id, segment, start, length, checksum FROM rollouts ORDER BY group_id")
        return {group_id: Location(*at) for group_id, *at in rows}


def _damage(folder: Path, at: Location, *, thorough: bool) -> str | None:
    name = f"{folder.name}/{at.segment}"
    try:
        size = (folder / at.segment).stat().st_size
        if size < at.start + at.length:
            return f"{name} is cut"
        if thorough:
            Segments(folder, 0).read(at)
    except FileNotFoundError:
        return f"{name} is missing"
    except LedgerError:
        return f"{name} does not have the checksums that it was written with"
    except OSError as error:
        return f"{name} cannot be read ({error})"
    return None


def read_totals(path: Path, timeout_s: float) -> LedgerTotals | None:
    """Read the totals; None if the file does not exist or has no tables yet.

    Args:
        path: the file.
        timeout_s: seconds for which another program may lock it.

    Raises:
        LedgerError: it is of another version.
        LedgerUnreadable: it cannot be read, for example because another program has locked it.
        sqlite3.DatabaseError: it is damaged.
    """
    if not path.is_file():
        return None
    with read_only(path, timeout_s) as db:
        db.execute("BEGIN")
        version = tables_version(db)
        if version is None:
            return None
        _check_version(path, version)
        totals: dict[str, dict[str, int]] = {"state": {}, "reason": {}}
        kept = db.execute("SELECT kind, name, total FROM tally WHERE kind IN ('state', 'reason') AND total <> 0")
        for kind, name, total in kept:
            totals[kind][name] = total
        newest = db.execute("SELECT version, step FROM versions ORDER BY version DESC LIMIT 1").fetchone()
        if newest is None:
            raise sqlite3.DatabaseError("its table versions is empty")
        return LedgerTotals(totals["state"], totals["reason"], *newest)
