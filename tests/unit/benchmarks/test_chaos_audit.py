"""benchmarks/chaos.py: what its audit adds to that of the package, when it is green, and its table."""

import time
from pathlib import Path

from benchmarks.chaos import Result
from benchmarks.faults.audit import audit, compare
from benchmarks.faults.kinds import KINDS
from benchmarks.faults.report import figures, table
from benchmarks.faults.schedule import Schedule
from benchmarks.faults.watch import Outcome
from quatro_ray.replay.ledger_reader import GroupRow, LedgerRows
from tests.unit.jobs.books import GROUPS, VERSIONS, books, trained


def found(*snapshots: LedgerRows) -> set[str]:
    """Names of the checks that found something."""
    return {name for name, wrong in audit(books(), snapshots).items() if wrong}


def before(*groups: GroupRow) -> LedgerRows:
    """When the newest version was 1."""
    return LedgerRows(groups, VERSIONS[:2])


def test_what_went_on_as_it_should_is_neither_lost_nor_duplicated() -> None:
    under_way = (*GROUPS[:2], GroupRow(3, "pending", None, None, None, None, None))
    assert compare(before(*under_way), books().ledger) == (set(), set())


def test_a_step_that_was_taken_back_may_be_trained_again() -> None:
    on_the_way = LedgerRows((*GROUPS[:2], trained(3, 1, 0, 1), trained(5, 1, 0, 1)), VERSIONS[:3])
    assert compare(on_the_way, books().ledger) == (set(), set())


def test_lost() -> None:
    gone = before(*GROUPS[:2], GroupRow(9, "ready", None, None, 0, 0, 10))
    assert compare(gone, books().ledger) == ({9}, set())
    was_trained = before(*GROUPS[:2], trained(7, 0, 0, 0))  # it is dropped at the end, and step 1 counts
    assert compare(was_trained, books().ledger) == ({7}, set())
    assert "lost" in found(was_trained)


def test_duplicated() -> None:
    twice = before(*GROUPS[:2], trained(3, 0, 0, 0))  # at the end it is trained from version 3, and step 1 counts too
    assert compare(twice, books().ledger) == (set(), {3})
    assert "duplicated" in found(twice)


def recovered(kind: str) -> Outcome:
    return Outcome(kind, 0, 5, 0.0, "", "", detected_s=1.0, recovered_s=2.0)


def test_a_call_is_green_only_if_every_kind_was_injected() -> None:
    assert Result([recovered("a"), recovered("b")], ["a", "b"], {}).failures() == []
    assert Result([recovered("a")], ["a", "b"], {}).failures() == ["b: never injected"]
    assert Result([], ["a"], {}).failures() == ["a: never injected"]
    assert Result([recovered("a")], ["a"], {"c": "needs root"}).failures() == [
        "c: cannot be injected here (needs root)"
    ]


def test_the_minutes_begin_with_the_first_fault(tmp_path: Path) -> None:
    kinds = list(KINDS[:2])
    schedule = Schedule(kinds, 0, 0.0, 10, tmp_path / "log", print)
    assert not schedule.is_over()
    schedule._first_at = time.monotonic()
    assert schedule.is_over()
    without = Schedule(kinds, 0, None, 2, tmp_path / "log", print)
    without.outcomes.append(recovered("a"))
    assert not without.is_over()
    without.outcomes.append(recovered("b"))
    assert without.is_over()


def test_the_table_names_every_kind_and_what_never_came() -> None:
    outcomes = [
        Outcome("a", 0, 5, 0.0, "", "", detected_s=1.0, recovered_s=20.0, requeued=3),
        Outcome("a", 0, 9, 0.0, "", "", detected_s=2.0, recovered_s=None, lost=1),
    ]
    shown = table(figures(outcomes, ["a", "b"])).splitlines()
    assert [cell.strip() for cell in shown[1].split("|")] == [
        "a", "2", "1.5, 2.0", "20.0, 20.0 (1 never)", "3", "1", "0", "0",
    ]  # fmt: skip
    assert shown[2].split("|")[1].strip() == "0"
