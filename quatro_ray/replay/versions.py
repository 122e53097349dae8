"""Every policy version that was ever issued, with its parent; kept in the ledger's database."""

from __future__ import annotations

import sqlite3

from quatro_ray.errors import LedgerError
from quatro_ray.replay.staleness import Lineage, Stretch

SCHEMA = """
CREATE TABLE versions (
    version INTEGER PRIMARY KEY,     -- a number is issued once
    parent INTEGER,
    step INTEGER NOT NULL,           -- optimiser steps from the starting policy
    fell_back INTEGER NOT NULL,      -- 1: the weights of `parent` under a new number; 0: one step from it
    digest INTEGER
);
CREATE INDEX first_of_stretch ON versions (version) WHERE fell_back OR version = 0;
INSERT INTO versions VALUES (0, NULL, 0, 0, NULL);
"""


class Versions:
    """The tree of versions; branches that the learner abandoned stay in it.

    Call the methods inside a transaction of the ledger.
    """

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def newest(self) -> int:
        """Return the newest version that was issued."""
        return int(self._db.execute("SELECT MAX(version) FROM versions").fetchone()[0])

    def step_of(self, version: int) -> int:
        """Return the optimiser steps of a version; raise LedgerError if it was never issued."""
        row = self._db.execute("SELECT step FROM versions WHERE version = ?", (version,)).fetchone()
        if row is None:
            raise LedgerError(f"version {version} was never issued; the newest is {self.newest()}")
        return int(row[0])

    def add_step(self, version: int) -> None:
        """Issue `version` + 1, one optimiser step after `version`, which must be the newest."""
        if version != self.newest():
            raise LedgerError(f"version {version + 1} cannot follow {version}: the newest is {self.newest()}")
        self._add(version + 1, version, self.step_of(version) + 1, fell_back=False)

    def add_fall_back(self, version: int) -> int:
        """Issue a new number for the weights of an earlier version, and return it."""
        number = self.newest() + 1
        self._add(number, version, self.step_of(version), fell_back=True)
        return number

    def _add(self, version: int, parent: int, step: int, *, fell_back: bool) -> None:
        self._db.execute(
            "INSERT INTO versions (version, parent, step, fell_back) VALUES (?, ?, ?, ?)",
            (version, parent, step, fell_back),
        )

    def lineage(self, version: int) -> Lineage:
        """Return the lineage of a version; raise LedgerError if it was never issued."""
        stretches: list[Stretch] = []
        last: int | None = version
        while last is not None:
            self.step_of(last)
            first, parent, step = self._db.execute(
                "SELECT version, parent, step FROM versions WHERE version <= ? AND (fell_back OR version = 0) "
                "ORDER BY version DESC LIMIT 1",
                (last,),
            ).fetchone()
            stretches.append(Stretch(first, last, step))
            last = parent
        return Lineage(tuple(reversed(stretches)))
