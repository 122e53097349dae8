"""Checks that a finished run's records must pass after any fault. Pure functions: each returns its findings.

Legend: B groups a step, N steps.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quatro_ray.types import DropReason

_FINAL = {"trained", "dropped"}


@dataclass(frozen=True)
class Group:
    """A row of the ledger's table `groups`."""

    group_id: int
    state: str
    reason: str | None
    learner_version: int | None
    oldest_version: int | None
    newest_version: int | None
    num_tokens: int | None


@dataclass(frozen=True)
class Version:
    """A row of `versions`: one step from `parent`, or, if it fell back, the parent's weights under a new number."""

    version: int
    parent: int | None
    step: int
    fell_back: bool


@dataclass(frozen=True)
class Ledger:
    """The tables of the ledger: groups in the order of their id, versions in the order of their number."""

    groups: tuple[Group, ...]
    versions: tuple[Version, ...]

    def lineage(self) -> list[Version]:
        """Return the versions from the starting policy to the newest one, without abandoned branches."""
        by_number = {v.version: v for v in self.versions}
        lineage: list[Version] = []
        at = max(by_number, default=None)
        while at is not None and at in by_number and len(lineage) <= len(by_number):
            lineage.append(by_number[at])
            at = by_number[at].parent
        return lineage[::-1]

    def committed(self) -> dict[int, int]:
        """Map each version from which a step of the lineage was made to that step's number, from 1."""
        return {v.parent: v.step for v in self.lineage() if not v.fell_back and v.parent is not None}

    def trained(self) -> dict[int, int]:
        """Map each trained group to the version from which its step was made."""
        return {
            g.group_id: g.learner_version for g in self.groups if g.state == "trained" and g.learner_version is not None
        }


@dataclass(frozen=True)
class Books:
    """All records that a finished run has written.

    Attributes:
        metrics: lines of metrics.jsonl.
        rollouts: lines of rollouts.jsonl without their texts.
        snapshots: the ledger at several times during the run.
    """

    ledger: Ledger
    metrics: Sequence[Mapping[str, Any]]
    rollouts: Sequence[Mapping[str, Any]]
    events: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]
    snapshots: Sequence[Ledger]
    num_steps: int
    groups_per_step: int
    max_staleness: int


def audit(books: Books) -> dict[str, list[str]]:
    """Run all checks; return the findings by check, also of those that found nothing."""
    ledger = books.ledger
    lost, duplicated = against_all(books.snapshots, ledger)
    return {
        "final_states": final_states(ledger),
        "ids": ids(ledger),
        "drops": drops(ledger),
        "versions": versions(ledger, books.events),
        "trained": trained(ledger, books.num_steps, books.groups_per_step),
        "staleness": staleness(ledger, books.max_staleness),
        "lost": [
            f"group {i} was trained in a snapshot and is not at the end, although its step is in the lineage"
            for i in sorted(lost)
        ],
        "duplicated": [f"group {i} was trained in two steps" for i in sorted(duplicated)],
        "metrics": metrics(books.metrics, books.num_steps),
        "rollouts": rollouts(ledger, books.rollouts, books.groups_per_step),
        "summary": summary(ledger, books.summary, books.num_steps, books.max_staleness),
    }


def final_states(ledger: Ledger) -> list[str]:
    """Check that every admitted group is trained or dropped."""
    return [f"group {g.group_id} is {g.state}" for g in ledger.groups if g.state not in _FINAL]


def ids(ledger: Ledger) -> list[str]:
    """Check that ids are 1, 2, 3, … without gaps, so that no group was forgotten."""
    found = Counter(g.group_id for g in ledger.groups)
    missing = sorted(set(range(1, max(found, default=0) + 1)) - set(found))
    twice = sorted(i for i, n in found.items() if n > 1)
    return [f"no group has id {i}" for i in missing] + [f"id {i} is there twice" for i in twice]


def drops(ledger: Ledger) -> list[str]:
    """Check that dropped groups, and only those, have a reason, which is one of DropReason."""
    wrong = []
    for group in ledger.groups:
        if group.state == "dropped" and group.reason not in set(DropReason):
            wrong.append(f"group {group.group_id} was dropped for {group.reason!r}")
        if group.state != "dropped" and group.reason is not None:
            wrong.append(f"group {group.group_id} is {group.state} and has a reason to be dropped, {group.reason!r}")
    return wrong


def versions(ledger: Ledger, events: Sequence[Mapping[str, Any]]) -> list[str]:
    """Check the tree of versions and the events about it.

    Numbers are 0, 1, 2, …, each issued once and from an earlier one; steps are counted along the lineage; every event
    fell_back has a version of its own that fell back.
    """
    wrong = []
    by_number: dict[int, Version] = {}
    for expected, version in enumerate(ledger.versions):
        if version.version != expected:
            wrong.append(f"version {version.version} stands where {expected} should")
        if version.version in by_number:
            wrong.append(f"version {version.version} was issued twice")
        wrong += _ancestry(version, by_number)
        by_number[version.version] = version
    told = Counter(e["version"] for e in _since_restored(events) if e["event"] == "fell_back")
    wrong += [f"version {v} was told {n} times as one that fell back" for v, n in told.items() if n > 1]
    fell_back = {v.version for v in ledger.versions if v.fell_back}
    return wrong + [f"version {v} was told as one that fell back, and is not" for v in sorted(set(told) - fell_back)]


def _since_restored(events: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Return the events since a checkpoint's ledger took the place of a damaged one: versions are issued again then."""
    at = max((i for i, e in enumerate(events) if e["event"] == "restored"), default=-1)
    return events[at + 1 :]


def _ancestry(version: Version, earlier: Mapping[int, Version]) -> list[str]:
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


def trained(ledger: Ledger, num_steps: int, groups_per_step: int) -> list[str]:
    """Check that each of the N steps of the lineage trained exactly B groups, and no abandoned step any."""
    committed = ledger.committed()
    wrong = []
    if (made := sorted(committed.values())) != list(range(1, num_steps + 1)):
        wrong.append(f"the lineage has {len(made)} steps, up to {max(made, default=0)}, instead of {num_steps}")
    by_step: defaultdict[int, list[int]] = defaultdict(list)
    for group_id, step in ledger.trained().items():
        by_step[step].append(group_id)
    for version, step in committed.items():
        if (num := len(by_step[version])) != groups_per_step:
            wrong.append(f"step {step}, from version {version}, was trained by {num} groups, not {groups_per_step}")
    for version in sorted(by_step.keys() - committed.keys()):
        wrong.append(f"groups {by_step[version]} count as trained from version {version}, which is not of the lineage")
    no_step = [g.group_id for g in ledger.groups if g.state == "trained" and g.learner_version is None]
    return wrong + [f"group {i} is trained, by no step" for i in no_step]


def staleness(ledger: Ledger, max_staleness: int) -> list[str]:
    """Check that all trained tokens are of the lineage, not newer than their step, and not too old."""
    lineage = {v.version: v.step for v in ledger.lineage()}
    wrong = []
    for group in ledger.groups:
        if group.state != "trained" or group.learner_version is None:
            continue
        if group.oldest_version not in lineage or group.newest_version not in lineage:
            wrong.append(
                f"group {group.group_id} holds tokens of versions {group.oldest_version} to {group.newest_version}, "
                "which are not of the lineage"
            )
        elif group.newest_version > group.learner_version:
            wrong.append(f"group {group.group_id} holds tokens that are newer than its step")
        elif (age := lineage.get(group.learner_version, 0) - lineage[group.oldest_version]) > max_staleness:
            wrong.append(f"group {group.group_id} was trained {age} steps old; the cap is {max_staleness}")
    return wrong


def compare(before: Ledger, after: Ledger) -> tuple[set[int], set[int]]:
    """Return the groups that were lost and those that were duplicated between two snapshots.

    A group is lost if it disappeared, or if a step of the lineage trained it and it is not trained any more. It is
    duplicated if a step of the lineage trained it and it counts as trained by another step.
    """
    now, there, counts = after.trained(), {g.group_id for g in after.groups}, after.committed()
    lost = {g.group_id for g in before.groups} - there
    duplicated: set[int] = set()
    for group_id, step in before.trained().items():
        if step in counts and now.get(group_id) != step:
            (duplicated if group_id in now else lost).add(group_id)
    return lost, duplicated


def against_all(snapshots: Iterable[Ledger], after: Ledger) -> tuple[set[int], set[int]]:
    """Return the groups that were lost and those that were duplicated since any snapshot."""
    lost: set[int] = set()
    duplicated: set[int] = set()
    for before in snapshots:
        more = compare(before, after)
        lost, duplicated = lost | more[0], duplicated | more[1]
    return lost, duplicated


def metrics(lines: Sequence[Mapping[str, Any]], num_steps: int) -> list[str]:
    """Check that metrics.jsonl has each of the N steps once, in order."""
    steps = [line["step"] for line in lines]
    if steps == list(range(1, num_steps + 1)):
        return []
    twice = sorted(s for s, n in Counter(steps).items() if n > 1)
    missing = sorted(set(range(1, num_steps + 1)) - set(steps))
    return [f"metrics.jsonl: {len(steps)} lines for {num_steps} steps; twice: {twice}; missing: {missing}"]


def rollouts(ledger: Ledger, lines: Sequence[Mapping[str, Any]], groups_per_step: int) -> list[str]:
    """Check that rollouts.jsonl agrees with the ledger; skipped if not all groups of a step are recorded."""
    recorded: defaultdict[int, list[int]] = defaultdict(list)
    for line in lines:
        recorded[line["step"]].append(line["group_id"])
    committed = ledger.committed()
    said: defaultdict[int, list[int]] = defaultdict(list)
    for group_id, version in ledger.trained().items():
        if version in committed:
            said[committed[version]].append(group_id)
    if max(map(len, recorded.values()), default=0) < groups_per_step:
        return []
    return [
        f"step {step}: rollouts.jsonl has groups {sorted(recorded[step])}, the ledger {sorted(said[step])}"
        for step in sorted(recorded.keys() | said.keys())
        if sorted(recorded[step]) != sorted(said[step])
    ]


def summary(ledger: Ledger, told: Mapping[str, Any], num_steps: int, max_staleness: int) -> list[str]:
    """Check that summary.json adds up and agrees with the ledger."""
    if not told:
        return ["there is no summary.json"]
    states = Counter(g.state for g in ledger.groups)
    reasons = Counter(g.reason for g in ledger.groups if g.state == "dropped")
    tokens = sum(g.num_tokens or 0 for g in ledger.groups if g.state == "trained")
    ages = told["staleness_tokens"]
    equal = {
        "groups": (_without_zeros(told["groups"]), dict(states)),
        "drops": (_without_zeros(told["drops"]), dict(reasons)),
        "groups_admitted": (told["groups_admitted"], len(ledger.groups)),
        "learner_steps": (told["learner_steps"], num_steps),
        "weight_updates": (told["weight_updates"], num_steps),
        "trained_tokens": (told["trained_tokens"], tokens),
        "staleness_tokens": (sum(ages.values()), told["trained_tokens"]),
    }
    wrong = [f"summary.json: {name} is {have}, expected {want}" for name, (have, want) in equal.items() if have != want]
    if told["generated_tokens"] < told["trained_tokens"]:
        wrong.append(
            f"summary.json: {told['generated_tokens']:,} tokens generated, and {told['trained_tokens']:,} trained"
        )
    if max(map(int, ages), default=0) > max_staleness:
        wrong.append(f"summary.json: tokens were trained {max(map(int, ages))} steps old; the cap is {max_staleness}")
    return wrong


def _without_zeros(counts: Mapping[str, int]) -> dict[str, int]:
    return {k: n for k, n in counts.items() if n}
