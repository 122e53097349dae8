"""A ledger of version 0, which had queries and rollouts in its tables, and two more states, is brought up to date."""

import json
import sqlite3
from pathlib import Path

from quatro_ray.replay.ledger import Ledger
from quatro_ray.types import DropReason, GroupState, Query

S = GroupState
_VERSION_0 = """
CREATE TABLE groups (
    group_id INTEGER PRIMARY KEY, query TEXT NOT NULL, state TEXT NOT NULL, reason TEXT, learner_version INTEGER,
    admitted_version INTEGER NOT NULL, oldest_version INTEGER, newest_version INTEGER, num_tokens INTEGER,
    mean_reward REAL, admitted_at REAL NOT NULL, ready_at REAL
);
CREATE TABLE owner (epoch INTEGER NOT NULL);
CREATE TABLE payloads (group_id INTEGER PRIMARY KEY, payload BLOB NOT NULL);
CREATE TABLE versions (
    version INTEGER PRIMARY KEY, parent INTEGER, step INTEGER NOT NULL, fell_back INTEGER NOT NULL
);
CREATE INDEX first_of_stretch ON versions (version) WHERE fell_back OR version = 0;
INSERT INTO versions VALUES (0, NULL, 0, 0);
CREATE INDEX by_age ON groups (state, oldest_version, group_id);
CREATE INDEX by_learner_version ON groups (state, learner_version) WHERE learner_version IS NOT NULL;
CREATE TABLE tally (kind TEXT NOT NULL, name TEXT NOT NULL, total INTEGER NOT NULL, PRIMARY KEY (kind, name))
    WITHOUT ROWID;
CREATE TRIGGER tally_admission AFTER INSERT ON groups BEGIN SELECT 1; END;
CREATE TRIGGER tally_state AFTER UPDATE OF state ON groups BEGIN SELECT 1; END;
CREATE TRIGGER tally_reason AFTER UPDATE OF reason ON groups BEGIN SELECT 1; END;
CREATE TRIGGER tally_tokens AFTER UPDATE OF num_tokens ON groups BEGIN SELECT 1; END;
INSERT INTO owner VALUES (3);
"""


def test_a_ledger_of_version_0_is_brought_up_to_date(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    db = sqlite3.connect(path)
    db.executescript(_VERSION_0)
    groups = [
        ("pending", None, None),
        ("generating", None, None),
        ("verifying", None, None),
        ("ready", None, 5),
        ("dropped", "stale", 7),
    ]
    for number, (state, reason, num_tokens) in enumerate(groups, 1):
        query = json.dumps({"query_id": f"q{number}", "prompt": "1+1=", "answer": "2", "source": "sums"})
        db.execute(
            "INSERT INTO groups (group_id, query, state, reason, num_tokens, admitted_version, admitted_at) "
            "VALUES (?, ?, ?, ?, ?, 0, 1.0)",
            (number, query, state, reason, num_tokens),
        )
    db.execute("INSERT INTO payloads VALUES (4, ?)", (b"rollouts",))
    db.commit()
    db.close()

    for times_opened in (4, 5):  # migrated once, then as it is
        ledger = Ledger(path)
        counts = ledger.counts()
        assert (counts[S.PENDING], counts[S.READY], counts[S.DROPPED]) == (3, 1, 1)
        assert (ledger.drops()[DropReason.STALE], ledger.num_tokens(), ledger.num_admitted()) == (1, 12, {"sums": 5})
        assert ledger.queries(S.READY) == [(4, Query("q4", "1+1=", "2", source="sums"))]
        assert ledger.payload(4) == b"rollouts"
        assert (ledger.times_opened, ledger.next_id()) == (times_opened, 6)
        ledger.move([4], S.LEASED, learner_version=0)
        ledger.move([4], S.READY)
        ledger.close()
