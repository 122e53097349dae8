"""What `quatro-ray audit` cannot know of a run: whether groups that were trained during it still count at its end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from quatro_ray.jobs.audit_checks import Books, check
from quatro_ray.replay.ledger_reader import LedgerRows


def audit(books: Books, snapshots: Sequence[LedgerRows]) -> dict[str, list[str]]:
    """Run all checks; return the findings by check, also of those that found nothing.

    Args:
        books: all that the run has written.
        snapshots: the ledger at several times during the run.
    """
    lost, duplicated = against_all(snapshots, books.ledger)
    return check(books) | {
        "lost": [
            f"group {i} was trained in a snapshot and is not at the end, although its step is in the lineage"
            for i in sorted(lost)
        ],
        "duplicated": [f"group {i} was trained in two steps" for i in sorted(duplicated)],
    }


def compare(before: LedgerRows, after: LedgerRows) -> tuple[set[int], set[int]]:
    """Return the groups that were lost and those that were duplicated between two snapshots.

    A group is lost if it disappeared, or if a step of the lineage trained it and it is not trained any more. It is
    duplicated if a step of the lineage trained it and it counts as trained by another step.
    """
    now, there, counts = after.trained, {g.group_id for g in after.groups}, after.committed
    lost = {g.group_id for g in before.groups} - there
    duplicated: set[int] = set()
    for group_id, step in before.trained.items():
        if step in counts and now.get(group_id) != step:
            (duplicated if group_id in now else lost).add(group_id)
    return lost, duplicated


def against_all(snapshots: Iterable[LedgerRows], after: LedgerRows) -> tuple[set[int], set[int]]:
    """Return the groups that were lost and those that were duplicated since any snapshot."""
    lost: set[int] = set()
    duplicated: set[int] = set()
    for before in snapshots:
        more = compare(before, after)
        lost, duplicated = lost | more[0], duplicated | more[1]
    return lost, duplicated
