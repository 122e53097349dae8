"""The checks of an audit: good books (tests/unit/jobs/books.py) pass, and every check can fail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from quatro_ray.jobs.audit_checks import Books, check
from quatro_ray.replay.ledger_reader import GroupRow, LedgerRows, VersionRow
from tests.unit.jobs.books import GROUPS, SUMMARY, VERSIONS, books, trained, with_group, with_versions


def found(of: Books) -> set[str]:
    """Names of the checks that found something."""
    return {name for name, wrong in check(of).items() if wrong}


def test_good_books_pass() -> None:
    assert found(books()) == set()


def test_the_line_leaves_out_what_was_abandoned() -> None:
    ledger = books().ledger
    assert [v.version for v in ledger.lineage] == [0, 1, 3, 4, 5]
    assert ledger.committed == {0: 1, 3: 2, 4: 3}


EVALUATED = {"step": 3, "version": 5, "set": "sums"}


def with_drops(**numbers: int) -> list[dict[str, int]]:
    """Metrics of three steps; the last one counts these drops."""
    return [{"step": 1}, {"step": 2}, {"step": 3} | {f"drops/{reason}": n for reason, n in numbers.items()}]


BAD: dict[str, tuple[str, Callable[[], Books]]] = {
    "a group is still leased": ("final_states", lambda: with_group(GROUPS[6]._replace(state="leased", reason=None))),
    "a group is forgotten": ("ids", lambda: books(ledger=LedgerRows(GROUPS[:6] + GROUPS[7:], VERSIONS))),
    "a group is there twice": ("ids", lambda: books(ledger=LedgerRows((*GROUPS, GROUPS[7]), VERSIONS))),
    "a drop without a reason": ("states", lambda: with_group(GROUPS[6]._replace(reason=None))),
    "a drop for an unknown reason": ("states", lambda: with_group(GROUPS[6]._replace(reason="bored"))),
    "a state that is none": ("states", lambda: with_group(GROUPS[6]._replace(state="lost", reason=None))),
    "a reason without a drop": ("states", lambda: with_group(GROUPS[0]._replace(reason="stale"))),
    "the last group is forgotten": ("ids", lambda: books(ledger=LedgerRows(GROUPS, VERSIONS, without_group=(9,)))),
    "ready tokens of no version": (
        "staleness",
        lambda: with_group(trained(7, 5, 4, 6)._replace(state="ready", learner_version=None)),
    ),
    "tokens in the wrong order": ("staleness", lambda: with_group(GROUPS[6]._replace(oldest_version=2))),
    "rollouts of a step that was not made": (
        "rollouts",
        lambda: books(rollouts=[*books().rollouts, {"step": 4, "group_id": 7}]),
    ),
    "rollouts of step 0": ("rollouts", lambda: books(rollouts=[*books().rollouts, {"step": 0, "group_id": 7}])),
    "step 0 was recorded": ("metrics", lambda: books(metrics=[{"step": 0}, *books().metrics])),
    "a version is missing": ("versions", lambda: books(ledger=LedgerRows(GROUPS, VERSIONS[:2] + VERSIONS[3:]))),
    "a version is there twice": ("versions", lambda: books(ledger=LedgerRows(GROUPS, (*VERSIONS, VERSIONS[5])))),
    "a version from nowhere": ("versions", lambda: with_versions(VersionRow(4, 9, 2, False))),
    "a step from a version that was not the newest": ("versions", lambda: with_versions(VersionRow(4, 1, 2, False))),
    "a step too many is counted": ("versions", lambda: with_versions(VersionRow(5, 4, 4, False))),
    "a version was told twice": ("versions", lambda: books(events=[*books().events, *books().events])),
    "a fall back that is none was told": (
        "versions",
        lambda: books(events=[{"event": "fell_back", "part": "learner", "version": 4}]),
    ),
    "a step is missing": ("trained", lambda: books(num_steps=4)),
    "a step has a group too few": ("trained", lambda: with_group(GROUPS[5]._replace(state="dropped", reason="stale"))),
    "a step has a group too many": ("trained", lambda: with_group(trained(7, 4, 3, 3))),
    "a group was trained by an abandoned step": ("trained", lambda: with_group(trained(7, 1, 1, 1))),
    "a group was trained by the last version, from which no step was made": (
        "trained",
        lambda: with_group(trained(7, 5, 4, 4)),
    ),
    "a group was trained by no step": ("trained", lambda: with_group(GROUPS[0]._replace(learner_version=None))),
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
    "a recorded group is missing": ("rollouts", lambda: books(rollouts=[*books().rollouts[:3], *books().rollouts[4:]])),
    "a group was recorded twice": ("rollouts", lambda: books(rollouts=[*books().rollouts[:5], books().rollouts[4]])),
    "steps were recorded in another order": ("metrics", lambda: books(metrics=[{"step": s} for s in (2, 1, 3)])),
    "more drops were recorded than made": ("drops", lambda: books(metrics=with_drops(stale=1, overlong=1))),
    "a set was evaluated twice": ("evaluations", lambda: books(evaluations=[EVALUATED, EVALUATED])),
    "a version was evaluated that is none": ("evaluations", lambda: books(evaluations=[EVALUATED | {"version": 6}])),
    "a version of another step was evaluated": ("evaluations", lambda: books(evaluations=[EVALUATED | {"step": 1}])),
    "a set was not evaluated": ("evaluations", lambda: books(evaluated_steps=frozenset({0, 1, 2, 3}))),
    "a query is not stored": ("stored", lambda: books(ledger=LedgerRows(GROUPS, VERSIONS, without_query=(8,)))),
    "rollouts are not stored": ("stored", lambda: books(ledger=LedgerRows(GROUPS, VERSIONS, without_rollouts=(8,)))),
    "no summary": ("summary", lambda: books(summary={})),
    "the summary lacks a field": ("summary", lambda: books(summary={"groups": {}})),
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


def test_samples_of_rollouts_must_be_of_groups_that_the_step_has_trained() -> None:
    samples = [{"step": 1, "group_id": 1}, {"step": 3, "group_id": 6}]
    assert found(books(rollouts=samples, rollouts_per_step=None)) == set()
    assert found(books(rollouts=[*samples, {"step": 2, "group_id": 7}], rollouts_per_step=None)) == {"rollouts"}


def test_drops_that_were_recorded_with_abandoned_steps_are_not_missed() -> None:
    assert found(books(metrics=with_drops(stale=1))) == set()
    assert found(books(metrics=with_drops())) == set()


def in_progress(*groups: GroupRow, **changes: Any) -> Books:
    """Return the books of a run that is to make a fourth step, with further groups."""
    ledger = LedgerRows((*GROUPS, *groups), VERSIONS)
    under_way: dict[str, Any] = {"ledger": ledger, "is_finished": False, "num_steps": 4, "summary": {}}
    return books(**(under_way | changes))


def test_what_is_under_way_in_a_run_that_is_not_finished_is_no_error() -> None:
    leased = trained(9, 5, 4, 5)._replace(state="leased")
    waiting = trained(10, 5, 5, 5)._replace(state="ready", learner_version=None)
    pending = GroupRow(11, "pending", None, None, None, None, None)
    assert found(in_progress(leased, waiting, pending)) == set()
    assert found(in_progress(leased._replace(learner_version=4))) == {"leases"}
    assert found(in_progress(is_finished=True, summary=SUMMARY)) > {"trained", "metrics"}


def test_a_step_is_recorded_after_its_commit() -> None:
    """The last one may be missing, also its rollouts; of a run in progress more, as its ledger is read later."""
    first = {"metrics": books().metrics[:2], "rollouts": books().rollouts[:3], "evaluations": books().evaluations[:2]}
    assert found(in_progress(**first)) == set()
    first["metrics"], first["rollouts"] = books().metrics[:1], books().rollouts[:1]
    assert found(in_progress(**first)) == {"metrics"}
    assert found(in_progress(**first, is_running=True)) == set()
    assert found(in_progress(metrics=[*books().metrics, {"step": 4}], is_running=True)) == {"metrics"}


def before_the_rewind(**changes: Any) -> Books:
    """Return books whose ledger has fallen back to version 1, and whose records are those of the abandoned step 2."""
    records = {
        "ledger": LedgerRows(GROUPS[:2], VERSIONS[:4]),
        "metrics": [{"step": 1}, {"step": 2}],
        "rollouts": [{"step": s, "group_id": g} for s, g in ((1, 1), (1, 2), (2, 7), (2, 8))],
        "evaluations": [EVALUATED | {"step": 2, "version": 2}],
        "events": [],
    }
    return in_progress(**(records | changes))


def test_records_of_abandoned_steps_are_there_until_the_fall_back_is_told() -> None:
    assert found(before_the_rewind()) == set()
    assert before_the_rewind().num_comparable == 1
    told = [{"event": "fell_back", "part": "learner", "version": 3}]
    assert found(before_the_rewind(events=told)) == {"metrics", "rollouts", "evaluations"}
    restored = [*told, {"event": "restored", "part": "ledger"}]
    assert found(before_the_rewind(events=restored)) == set()
    wrong = [{"step": 1, "group_id": 7}]
    assert found(before_the_rewind(rollouts=wrong)) == {"rollouts"}  # an earlier step is compared all the same


def test_versions_may_be_told_again_after_the_ledger_was_restored() -> None:
    again = [*books().events, {"event": "restored", "part": "ledger"}, *books().events]
    assert found(books(events=again)) == set()


def test_a_finding_about_many_groups_names_some() -> None:
    many = tuple(trained(i, 1, 1, 1) for i in range(9, 1_033))
    (finding,) = check(books(ledger=LedgerRows((*GROUPS, *many), VERSIONS)))["trained"]
    assert finding.startswith("groups [9, 10, 11, ") and "24, and 1,008 more] count as trained" in finding


def test_an_evaluation_that_was_told_as_left_out_is_not_missing() -> None:
    told = [*books().events, {"event": "failed", "part": "evaluation", "step": 2}]
    assert found(books(events=told, evaluated_steps=frozenset({0, 1, 2, 3}))) == set()
