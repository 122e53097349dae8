"""The audit of benchmarks/chaos.py: good books pass, and every check can fail.

The good books: three steps of two groups, with a fall-back after the second, whose step is made again.

    0 ─1─ 1 ─2─ 2      (abandoned with version 2: step 2 was made from 1)
          └──── 3 ─2─ 4 ─3─ 5
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.chaos import Result
from benchmarks.faults.audit import Books, Group, Ledger, Version, audit, compare
from benchmarks.faults.kinds import KINDS
from benchmarks.faults.report import figures, table
from benchmarks.faults.schedule import Schedule
from benchmarks.faults.watch import Outcome

VERSIONS = (
    Version(0, None, 0, False),
    Version(1, 0, 1, False),
    Version(2, 1, 2, False),
    Version(3, 1, 1, True),
    Version(4, 3, 2, False),
    Version(5, 4, 3, False),
)


def trained(group_id: int, learner_version: int, oldest: int, newest: int) -> Group:
    return Group(group_id, "trained", None, learner_version, oldest, newest, 10)


GROUPS = (
    trained(1, 0, 0, 0),
    trained(2, 0, 0, 0),
    trained(3, 3, 0, 1),
    trained(4, 3, 1, 1),
    trained(5, 4, 1, 3),
    trained(6, 4, 3, 4),
    Group(7, "dropped", "stale", None, 0, 1, 10),
    Group(8, "dropped", "run_ended", None, None, None, None),
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
    steps = {1: (1, 2), 2: (3, 4), 3: (5, 6)}
    good = Books(
        ledger=Ledger(GROUPS, VERSIONS),
        metrics=[{"step": s} for s in steps],
        rollouts=[{"step": s, "group_id": g} for s, ids in steps.items() for g in ids],
        events=[{"event": "fell_back", "part": "learner", "version": 3}],
        summary=SUMMARY,
        snapshots=[],
        num_steps=3,
        groups_per_step=2,
        max_staleness=1,
    )
    return replace(good, **changes)


def with_group(group: Group) -> Books:
    groups = tuple(group if g.group_id == group.group_id else g for g in GROUPS)
    return books(ledger=Ledger(groups, VERSIONS))


def with_versions(*versions: Version) -> Books:
    by_number = {v.version: v for v in VERSIONS} | {v.version: v for v in versions}
    return books(ledger=Ledger(GROUPS, tuple(by_number.values())))


def found(of: Books) -> set[str]:
    """Names of the checks that found something."""
    return {name for name, wrong in audit(of).items() if wrong}


def test_good_books_pass() -> None:
    assert found(books()) == set()


def test_the_line_leaves_out_what_was_abandoned() -> None:
    ledger = books().ledger
    assert [v.version for v in ledger.lineage()] == [0, 1, 3, 4, 5]
    assert ledger.committed() == {0: 1, 3: 2, 4: 3}


BAD: dict[str, tuple[str, Callable[[], Books]]] = {
    "a group is still leased": ("final_states", lambda: with_group(replace(GROUPS[6], state="leased", reason=None))),
    "a group is forgotten": ("ids", lambda: books(ledger=Ledger(GROUPS[:6] + GROUPS[7:], VERSIONS))),
    "a group is there twice": ("ids", lambda: books(ledger=Ledger((*GROUPS, GROUPS[7]), VERSIONS))),
    "a drop without a reason": ("drops", lambda: with_group(replace(GROUPS[6], reason=None))),
    "a drop for an unknown reason": ("drops", lambda: with_group(replace(GROUPS[6], reason="bored"))),
    "a reason without a drop": ("drops", lambda: with_group(replace(GROUPS[0], reason="stale"))),
    "a version is missing": ("versions", lambda: books(ledger=Ledger(GROUPS, VERSIONS[:2] + VERSIONS[3:]))),
    "a version is there twice": ("versions", lambda: books(ledger=Ledger(GROUPS, (*VERSIONS, VERSIONS[5])))),
    "a version from nowhere": ("versions", lambda: with_versions(Version(4, 9, 2, False))),
    "a step from a version that was not the newest": ("versions", lambda: with_versions(Version(4, 1, 2, False))),
    "a step too many is counted": ("versions", lambda: with_versions(Version(5, 4, 4, False))),
    "a version was told twice": ("versions", lambda: books(events=[*books().events, *books().events])),
    "a fall back that is none was told": (
        "versions",
        lambda: books(events=[{"event": "fell_back", "part": "learner", "version": 4}]),
    ),
    "a step is missing": ("trained", lambda: books(num_steps=4)),
    "a step has a group too few": ("trained", lambda: with_group(replace(GROUPS[5], state="dropped", reason="stale"))),
    "a step has a group too many": ("trained", lambda: with_group(trained(7, 4, 3, 3))),
    "a group was trained by an abandoned step": ("trained", lambda: with_group(trained(7, 1, 1, 1))),
    "a group was trained by the last version, from which no step was made": (
        "trained",
        lambda: with_group(trained(7, 5, 4, 4)),
    ),
    "a group was trained by no step": ("trained", lambda: with_group(replace(GROUPS[0], learner_version=None))),
    "tokens of an abandoned version were trained": ("staleness", lambda: with_group(trained(6, 4, 2, 4))),
    "tokens were trained that are too old": ("staleness", lambda: with_group(trained(6, 4, 0, 4))),
    "tokens were trained that are newer than the step": ("staleness", lambda: with_group(trained(3, 3, 1, 4))),
    "a step was recorded twice": ("metrics", lambda: books(metrics=[{"step": s} for s in (1, 2, 2, 3)])),
    "a step was not recorded": ("metrics", lambda: books(metrics=[{"step": s} for s in (1, 3)])),
    "another group was recorded than the ledger has": (
        "rollouts",
        lambda: books(rollouts=[*books().rollouts[:-1], {"step": 3, "group_id": 7}]),
    ),
    "a group was recorded in two steps": (
        "rollouts",
        lambda: books(rollouts=[*books().rollouts, {"step": 3, "group_id": 1}]),
    ),
    "no summary": ("summary", lambda: books(summary={})),
    "the summary counts other groups": ("summary", lambda: books(summary=SUMMARY | {"groups_admitted": 9})),
    "the summary counts other drops": ("summary", lambda: books(summary=SUMMARY | {"drops": {"stale": 2}})),
    "the summary counts steps that were taken back": ("summary", lambda: books(summary=SUMMARY | {"learner_steps": 4})),
    "the summary counts other tokens": ("summary", lambda: books(summary=SUMMARY | {"trained_tokens": 70})),
    "more tokens trained than generated": ("summary", lambda: books(summary=SUMMARY | {"generated_tokens": 59})),
    "the summary has tokens that are too old": (
        "summary",
        lambda: books(summary=SUMMARY | {"staleness_tokens": {"2": 60}}),
    ),
}


@pytest.mark.parametrize(("check", "make"), BAD.values(), ids=BAD)
def test_bad_books_do_not(check: str, make: Callable[[], Books]) -> None:
    assert check in found(make())


def test_rollouts_that_are_samples_only_say_nothing() -> None:
    assert found(books(rollouts=[{"step": 1, "group_id": 1}, {"step": 2, "group_id": 7}])) == set()


def before(*groups: Group) -> Ledger:
    """When the newest version was 1."""
    return Ledger(groups, VERSIONS[:2])


def test_what_went_on_as_it_should_is_neither_lost_nor_duplicated() -> None:
    under_way = (*GROUPS[:2], Group(3, "pending", None, None, None, None, None))
    assert compare(before(*under_way), books().ledger) == (set(), set())


def test_a_step_that_was_taken_back_may_be_trained_again() -> None:
    on_the_way = Ledger((*GROUPS[:2], trained(3, 1, 0, 1), trained(5, 1, 0, 1)), VERSIONS[:3])
    assert compare(on_the_way, books().ledger) == (set(), set())


def test_lost() -> None:
    gone = before(*GROUPS[:2], Group(9, "ready", None, None, 0, 0, 10))
    assert compare(gone, books().ledger) == ({9}, set())
    was_trained = before(*GROUPS[:2], trained(7, 0, 0, 0))  # it is dropped at the end, and step 1 counts
    assert compare(was_trained, books().ledger) == ({7}, set())
    assert "lost" in found(books(snapshots=[was_trained]))


def test_duplicated() -> None:
    twice = before(*GROUPS[:2], trained(3, 0, 0, 0))  # at the end it is trained from version 3, and step 1 counts too
    assert compare(twice, books().ledger) == (set(), {3})
    assert "duplicated" in found(books(snapshots=[twice]))


def test_versions_may_be_told_again_after_the_ledger_was_restored() -> None:
    again = [*books().events, {"event": "restored", "part": "ledger"}, *books().events]
    assert found(books(events=again)) == set()


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
