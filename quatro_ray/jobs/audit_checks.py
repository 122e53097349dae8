"""Checks that a run's ledger and records must pass, however often it fell back. Pure functions that return findings.

Legend: B groups a step, N steps of the lineage. A finding is a line that names the group, step or version.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from quatro_ray.replay.ledger_reader import GroupRow, LedgerRows, VersionRow
from quatro_ray.telemetry.record_types import number
from quatro_ray.types import DropReason, GroupState

_FINAL = frozenset({GroupState.TRAINED, GroupState.DROPPED})
_STATES = frozenset(GroupState)
_REASONS = frozenset(DropReason)
_MAX_IDS = 16
_SUMMED = (
    "groups", "drops", "groups_admitted", "learner_steps", "weight_updates", "trained_tokens", "generated_tokens",
    "staleness_tokens",
)  # fmt: skip

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Books:
    """All that a run has recorded. Of a run in progress, the ledger was read last.

    Attributes:
        metrics: lines of metrics.jsonl.
        rollouts: lines of rollouts.jsonl, without their texts.
        evaluations: lines of evaluations.jsonl.
        events: lines of events.jsonl.
        summary: summary.json; empty if there is none.
        num_steps: steps of the whole run, as configured.
        groups_per_step: B.
        max_staleness: the cap that held for the whole run; None if there is none, or if it may have changed.
        rollouts_per_step: lines of rollouts.jsonl for each step; None if the number may have changed.
        is_finished: the run is done, so that nothing may be under way.
        is_running: a process writes these records, and may be ahead of what was read.
        evaluated_steps: steps at which every set has been evaluated; empty if that is not certain.
    """

    ledger: LedgerRows
    metrics: Sequence[Record]
    rollouts: Sequence[Record]
    evaluations: Sequence[Record]
    events: Sequence[Record]
    summary: Record
    num_steps: int
    groups_per_step: int
    max_staleness: int | None
    rollouts_per_step: int | None
    is_finished: bool
    is_running: bool = False
    evaluated_steps: frozenset[int] = frozenset()

    @cached_property
    def num_recorded(self) -> int:
        """The last step that metrics.jsonl has."""
        return max((line["step"] for line in self.metrics), default=0)

    @cached_property
    def _untold(self) -> list[VersionRow]:
        """Fall-backs of the lineage that events.jsonl does not have: it gets them after the records were rewound."""
        told = {e.get("version") for e in self.events if e["event"] == "fell_back"}
        return [v for v in self.ledger.lineage if v.fell_back and v.version not in told]

    @property
    def is_rewinding(self) -> bool:
        """Whether records of abandoned steps may still be there, because a fall-back or a resumption is under way."""
        last = next((e["event"] for e in reversed(self.events) if e["event"] in ("fell_back", "restored")), None)
        return bool(self._untold) or last == "restored"

    @cached_property
    def num_comparable(self) -> int:
        """The last step whose records are those of the ledger's lineage; later ones may be of another one."""
        return min([self.num_recorded, self.ledger.step, *(v.step for v in self._untold)])

    @cached_property
    def trained_in(self) -> dict[int, list[int]]:
        """The groups that each step of the lineage was trained on, as the ledger has them."""
        by_step: defaultdict[int, list[int]] = defaultdict(list)
        for group_id, version in self.ledger.trained.items():
            if version in self.ledger.committed:
                by_step[self.ledger.committed[version]].append(group_id)
        return by_step


def check(books: Books) -> dict[str, list[str]]:
    """Run all checks; return the findings by check, also of those that found nothing."""
    ledger = books.ledger
    return {
        "final_states": final_states(ledger) if books.is_finished else [],
        "ids": ids(ledger),
        "states": states(ledger),
        "stored": stored(ledger),
        "leases": leases(ledger),
        "versions": versions(ledger, books.events),
        "trained": trained(ledger, books.num_steps if books.is_finished else None, books.groups_per_step),
        "staleness": staleness(ledger, books.max_staleness),
        "metrics": metrics(books),
        "drops": drops(ledger, books.metrics),
        "rollouts": rollouts(books),
        "evaluations": evaluations(books),
        "summary": summary(books) if books.is_finished else [],
    }


def final_states(ledger: LedgerRows) -> list[str]:
    """Check that every admitted group is trained or dropped."""
    return [f"group {g.group_id} is {g.state}" for g in ledger.groups if g.state not in _FINAL]


def ids(ledger: LedgerRows) -> list[str]:
    """Check that ids are 1, 2, 3, … without gaps, up to the last query's, so that no group was forgotten."""
    found = Counter(g.group_id for g in ledger.groups)
    missing = sorted((set(range(1, max(found, default=0) + 1)) | set(ledger.without_group)) - found.keys())
    twice = sorted(i for i, n in found.items() if n > 1)
    return [f"no group has id {i}" for i in missing] + [f"id {i} is there twice" for i in twice]


def states(ledger: LedgerRows) -> list[str]:
    """Check that every state is known, and that dropped groups, and no others, have a reason that is known."""
    wrong = []
    for group in ledger.groups:
        if group.state not in _STATES:
            wrong.append(f"group {group.group_id} is in the state {group.state!r}, which does not exist")
        if group.state == GroupState.DROPPED and group.reason not in _REASONS:
            wrong.append(f"group {group.group_id} was dropped for {group.reason!r}")
        if group.state != GroupState.DROPPED and group.reason is not None:
            wrong.append(f"group {group.group_id} is {group.state} and has a reason to be dropped, {group.reason!r}")
    return wrong


def stored(ledger: LedgerRows) -> list[str]:
    """Check that pending groups can be generated, and that ready and leased ones can be trained."""
    wrong = [f"group {i} is pending, and its query is not stored" for i in ledger.without_query]
    return wrong + [f"group {i} is ready or leased, and its rollouts are not stored" for i in ledger.without_rollouts]


def leases(ledger: LedgerRows) -> list[str]:
    """Check that groups are leased to the step from the newest version only: no other step will train them."""
    newest = max((v.version for v in ledger.versions), default=0)
    return [
        f"group {g.group_id} is leased to the step from version {g.learner_version}; the newest version is {newest}"
        for g in ledger.groups
        if g.state == GroupState.LEASED and g.learner_version != newest
    ]


def versions(ledger: LedgerRows, events: Sequence[Record]) -> list[str]:
    """Check the tree of versions and the events about it.

    Numbers are 0, 1, 2, …, each issued once and from an earlier one; steps are counted along the lineage; every event
    fell_back has a version of its own that fell back.
    """
    wrong = []
    by_number: dict[int, VersionRow] = {}
    for expected, version in enumerate(ledger.versions):
        if version.version != expected:
            wrong.append(f"version {version.version} stands where {expected} should")
        if version.version in by_number:
            wrong.append(f"version {version.version} was issued twice")
        wrong += _ancestry(version, by_number)
        by_number[version.version] = version
    told = Counter(e.get("version") for e in _since_restored(events) if e["event"] == "fell_back")
    wrong += [f"version {v} was told {n} times as one that fell back" for v, n in told.items() if n > 1]
    fell_back = {v.version for v in ledger.versions if v.fell_back}
    return wrong + [f"version {v} was told as one that fell back, and is not" for v in told if v not in fell_back]


def _since_restored(events: Sequence[Record]) -> Sequence[Record]:
    """Return the events since a checkpoint's ledger took the place of a damaged one: versions are issued again then."""
    at = max((i for i, e in enumerate(events) if e["event"] == "restored"), default=-1)
    return events[at + 1 :]


def _ancestry(version: VersionRow, earlier: Mapping[int, VersionRow]) -> list[str]:
    if version.version == 0:
        return [] if (version.parent, version.step) == (None, 0) else ["version 0 is not the starting policy"]
    parent = earlier.get(-1 if version.parent is None else version.parent)
    if parent is None:
        return [f"version {version.version} comes from {version.parent}, which was not there before"]
    if not version.fell_back and parent.version != version.version - 1:
        return [f"version {version.version} is a step from {parent.version}, which was not the newest"]
    if (expected := parent.step + (not version.fell_back)) != version.step:
        return [f"version {version.version} counts {version.step} steps instead of {expected}"]
    return []


def trained(ledger: LedgerRows, num_steps: int | None, groups_per_step: int) -> list[str]:
    """Check that each step of the lineage trained exactly B groups, and no abandoned step any.

    Args:
        ledger: the ledger.
        num_steps: N of a run that is finished; else None.
        groups_per_step: B.
    """
    wrong = []
    made = sorted(ledger.committed.values())
    expected = num_steps if num_steps is not None else len(made)
    if made != list(range(1, expected + 1)):
        wrong.append(f"the lineage has {len(made)} steps, up to {max(made, default=0)}, instead of {expected}")
    by_version: defaultdict[int, list[int]] = defaultdict(list)
    for group_id, version in ledger.trained.items():
        by_version[version].append(group_id)
    for version, step in ledger.committed.items():
        if (num := len(by_version[version])) != groups_per_step:
            wrong.append(f"step {step}, from version {version}, was trained by {num} groups, not {groups_per_step}")
    for version in sorted(by_version.keys() - ledger.committed.keys()):
        group_ids = some(by_version[version])
        wrong.append(f"groups {group_ids} count as trained from version {version}, which is not of the lineage")
    no_step = [g.group_id for g in ledger.groups if g.state == GroupState.TRAINED and g.learner_version is None]
    return wrong + [f"group {i} is trained, by no step" for i in no_step]


def staleness(ledger: LedgerRows, max_staleness: int | None) -> list[str]:
    """Check that all trained tokens are of the lineage, not newer than their step, and not older than the cap."""
    lineage = {v.version: v.step for v in ledger.lineage}
    checked = (g for g in ledger.groups if g.state == GroupState.TRAINED and g.learner_version is not None)
    wrong = [what for group in checked if (what := _age(group, lineage, max_staleness))]
    issued = {v.version for v in ledger.versions}
    for group in ledger.groups:
        oldest, newest = group.oldest_version, group.newest_version
        if group.state in (GroupState.READY, GroupState.LEASED) and not {oldest, newest} <= issued:
            wrong.append(f"group {group.group_id} holds tokens of versions {oldest} to {newest}, never issued")
        elif oldest is not None and newest is not None and oldest > newest:
            wrong.append(f"group {group.group_id} holds tokens of versions {oldest} to {newest}, in the wrong order")
    return wrong


def _age(group: GroupRow, lineage: Mapping[int, int], max_staleness: int | None) -> str | None:
    name, oldest, newest = f"group {group.group_id}", group.oldest_version, group.newest_version
    if oldest is None or newest is None or oldest not in lineage or newest not in lineage:
        return f"{name} holds tokens of versions {oldest} to {newest}, which are not of the lineage"
    version = group.learner_version or 0
    if newest > version:
        return f"{name} holds tokens that are newer than its step"
    if max_staleness is not None and (age := lineage.get(version, 0) - lineage[oldest]) > max_staleness:
        return f"{name} was trained {age} steps old; the cap is {max_staleness}"
    return None


def metrics(books: Books) -> list[str]:
    """Check that metrics.jsonl has each step of the ledger's lineage once, in order.

    A step is recorded after it was committed, so the last one may still be missing if the run is not finished.
    """
    steps = [line["step"] for line in books.metrics]
    last = books.num_steps if books.is_finished else books.num_recorded
    wrong = [f"metrics.jsonl: step {s} is there {n} times" for s, n in sorted(Counter(steps).items()) if n > 1]
    wrong += [f"metrics.jsonl: step {s} does not exist" for s in sorted(set(steps)) if s < 1]
    wrong += [f"metrics.jsonl: step {s} is missing" for s in sorted(set(range(1, last + 1)) - set(steps))]
    for before, step in pairwise(steps):
        if step < before:
            wrong.append(f"metrics.jsonl: step {step} stands after step {before}")
    made, told = books.ledger.step, books.num_recorded
    if told > made and not books.is_rewinding:
        wrong.append(f"metrics.jsonl: has steps up to {told}, and the ledger up to {made}")
    if made > told + 1 and not (books.is_running or books.is_finished):
        wrong.append(f"metrics.jsonl: has steps up to {told} only, and the ledger up to {made}")
    return wrong


def drops(ledger: LedgerRows, lines: Sequence[Record]) -> list[str]:
    """Check that metrics.jsonl counts no more drops than there are; steps that were abandoned may have had others."""
    made = Counter(g.reason for g in ledger.groups if g.state == GroupState.DROPPED)
    told: Counter[str] = Counter()
    for line in lines:
        told.update({str(r): int(number(line, f"drops/{r}") or 0) for r in _REASONS if f"drops/{r}" in line})
    return [
        f"metrics.jsonl: counts {n} groups dropped for {reason}, and the ledger {made[reason]}"
        for reason, n in sorted(told.items())
        if n > made[reason]
    ]


def rollouts(books: Books) -> list[str]:
    """Check that the groups of each step in rollouts.jsonl are those that the ledger has, or some of them."""
    recorded: defaultdict[int, list[int]] = defaultdict(list)
    for line in books.rollouts:
        recorded[line["step"]].append(line["group_id"])
    expected = books.rollouts_per_step and min(books.rollouts_per_step, books.groups_per_step)
    wrong = []
    if not books.is_rewinding:
        beyond = [s for s in sorted(recorded) if not 1 <= s <= books.ledger.step]
        wrong += [f"rollouts.jsonl: has step {s}, and the ledger steps up to {books.ledger.step}" for s in beyond]
    for step in range(1, books.num_comparable + 1):
        said, found = books.trained_in.get(step, []), recorded[step]
        if len(set(found)) < len(found) or not set(found) <= set(said):
            wrong.append(f"step {step}: rollouts.jsonl has groups {some(found)}, the ledger {some(said)}")
        elif expected is not None and len(found) != expected and (step < books.num_comparable or books.is_finished):
            wrong.append(f"step {step}: rollouts.jsonl has {len(found)} groups instead of {expected}")
    return wrong


def some(group_ids: Sequence[int]) -> str:
    """Return the ids in order, at most 16 of them."""
    shown = ", ".join(map(str, sorted(group_ids)[:_MAX_IDS]))
    return f"[{shown}, and {len(group_ids) - _MAX_IDS:,} more]" if len(group_ids) > _MAX_IDS else f"[{shown}]"


def evaluations(books: Books) -> list[str]:
    """Check that each set was evaluated once at a step of the lineage, under a version of that step."""
    made, step_of = books.ledger.step, {v.version: v.step for v in books.ledger.versions}
    lines = [e for e in books.evaluations if not (books.is_rewinding and e["step"] > books.num_comparable)]
    number = Counter((e["step"], e["set"]) for e in lines)
    wrong = [f"evaluations.jsonl: {name} at step {s} is there {n} times" for (s, name), n in number.items() if n > 1]
    for line in lines:
        what = f"evaluations.jsonl: {line['set']} at step {line['step']}"
        if line["step"] > made:
            wrong.append(f"{what} is of a step that the ledger does not have; it has {made}")
        elif (step := step_of.get(line["version"])) != line["step"]:
            has = "does not have" if step is None else f"has at step {step}"
            wrong.append(f"{what} is of version {line['version']}, which the ledger {has}")
    return wrong + _missing_evaluations(books, number.keys())


def _missing_evaluations(books: Books, found: Set[tuple[int, str]]) -> list[str]:
    """Return what is missing, apart from the evaluations that the run has told as left out."""
    left_out = {e.get("step") for e in books.events if (e["event"], e["part"]) == ("failed", "evaluation")}
    names = {name for _, name in found} | set(books.summary.get("evaluations", ()))
    wanted = {(step, name) for step in books.evaluated_steps - left_out for name in names}
    return [f"evaluations.jsonl: {name} at step {step} is missing" for step, name in sorted(wanted - found)]


def summary(books: Books) -> list[str]:
    """Check that summary.json adds up and agrees with the ledger."""
    told, groups = books.summary, books.ledger.groups
    if not told:
        return ["there is no summary.json"]
    if absent := [name for name in _SUMMED if name not in told]:
        return [f"summary.json: has no {name}" for name in absent]
    states_now = Counter(str(g.state) for g in groups)
    reasons = Counter(g.reason for g in groups if g.state == GroupState.DROPPED)
    tokens = sum(g.num_tokens or 0 for g in groups if g.state == GroupState.TRAINED)
    ages = told["staleness_tokens"]
    equal = {
        "groups": (_without_zeros(told["groups"]), dict(states_now)),
        "drops": (_without_zeros(told["drops"]), dict(reasons)),
        "groups_admitted": (told["groups_admitted"], len(groups)),
        "learner_steps": (told["learner_steps"], books.num_steps),
        "weight_updates": (told["weight_updates"], books.num_steps),
        "trained_tokens": (told["trained_tokens"], tokens),
        "staleness_tokens": (sum(ages.values()), told["trained_tokens"]),
    }
    wrong = [f"summary.json: {name} is {have}, expected {want}" for name, (have, want) in equal.items() if have != want]
    if told["generated_tokens"] < told["trained_tokens"]:
        wrong.append(
            f"summary.json: {told['generated_tokens']:,} tokens generated, and {told['trained_tokens']:,} trained"
        )
    oldest = max(map(int, ages), default=0)
    if books.max_staleness is not None and oldest > books.max_staleness:
        wrong.append(f"summary.json: tokens were trained {oldest} steps old; the cap is {books.max_staleness}")
    return wrong


def _without_zeros(counts: Mapping[str, int]) -> dict[str, int]:
    return {k: n for k, n in counts.items() if n}
