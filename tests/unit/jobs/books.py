"""Good books of a run, to be falsified: three steps of two groups, with a fall-back after the second, made again.

0 ─1─ 1 ─2─ 2      (abandoned with version 2: step 2 was made from 1)
      └──── 3 ─2─ 4 ─3─ 5
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quatro_ray.jobs.audit_checks import Books
from quatro_ray.replay.ledger_reader import GroupRow, LedgerRows, VersionRow

VERSIONS = (
    VersionRow(0, None, 0, False),
    VersionRow(1, 0, 1, False),
    VersionRow(2, 1, 2, False),
    VersionRow(3, 1, 1, True),
    VersionRow(4, 3, 2, False),
    VersionRow(5, 4, 3, False),
)


def trained(group_id: int, learner_version: int, oldest: int, newest: int) -> GroupRow:
    return GroupRow(group_id, "trained", None, learner_version, oldest, newest, 10)


GROUPS = (
    trained(1, 0, 0, 0),
    trained(2, 0, 0, 0),
    trained(3, 3, 0, 1),
    trained(4, 3, 1, 1),
    trained(5, 4, 1, 3),
    trained(6, 4, 3, 4),
    GroupRow(7, "dropped", "stale", None, 0, 1, 10),
    GroupRow(8, "dropped", "run_ended", None, None, None, None),
)
SUMMARY: dict[str, Any] = {
    "groups": {"pending": 0, "trained": 6, "dropped": 2},
    "drops": {"stale": 1, "run_ended": 1, "verifier_error": 0},
    "groups_admitted": 8,
    "learner_steps": 3,
    "weight_updates": 3,
    "trained_tokens": 60,
    "staleness_tokens": {"0": 40, "1": 20},
    "generated_tokens": 90,
}


def books(**changes: Any) -> Books:
    """Return the books of the finished run, with these changes."""
    steps = {1: (1, 2), 2: (3, 4), 3: (5, 6)}
    good = Books(
        ledger=LedgerRows(GROUPS, VERSIONS),
        metrics=[{"step": s} for s in steps],
        rollouts=[{"step": s, "group_id": g} for s, ids in steps.items() for g in ids],
        evaluations=[{"step": s, "version": v, "set": "sums"} for s, v in ((0, 0), (1, 3), (3, 5))],
        events=[{"event": "fell_back", "part": "learner", "version": 3}],
        summary=SUMMARY,
        num_steps=3,
        groups_per_step=2,
        max_staleness=1,
        rollouts_per_step=2,
        is_finished=True,
    )
    return replace(good, **changes)


def with_group(group: GroupRow) -> Books:
    groups = tuple(group if g.group_id == group.group_id else g for g in GROUPS)
    return books(ledger=LedgerRows(groups, VERSIONS))


def with_versions(*versions: VersionRow) -> Books:
    by_number = {v.version: v for v in VERSIONS} | {v.version: v for v in versions}
    return books(ledger=LedgerRows(GROUPS, tuple(by_number.values())))
