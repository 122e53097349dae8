"""Averages of the runs in each cell, and the claims of the study with their exceptions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean
from typing import Any

from benchmarks.toy.grid import EARLIER, METHODS

Run = Mapping[str, Any]
MARGIN = 0.02
_FINAL_PART = 1 / 4
"""Final figures are means over the evaluations in this last part of a run, which are three, to reduce noise."""


@dataclass(frozen=True, order=True)
class Cell:
    task: str
    staleness: int
    multiple: int


@dataclass(frozen=True)
class Figures:
    """Means over the seeds of one method in one cell. `collapsed`: runs that ended below their start."""

    final: float
    lowest: float
    highest: float
    best: float
    area: float
    pass_at_16: float
    unique: float
    entropy: float
    num_runs: int
    collapsed: int


Row = dict[tuple[str, bool], Figures]
"""The figures of a cell, by method and whether it had step control."""
Table = dict[Cell, Row]


Grouped = dict[Cell, dict[tuple[str, bool], list[Run]]]


def tabulate(runs: Iterable[Run]) -> Table:
    return {cell: {key: _figures(group) for key, group in row.items()} for cell, row in _grouped(runs).items()}


def _grouped(runs: Iterable[Run]) -> Grouped:
    grouped: defaultdict[Cell, defaultdict[tuple[str, bool], list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        cell = Cell(run["task"], run["staleness"], run["multiple"])
        grouped[cell][run["method"], run["control"]].append(run)
    return {cell: dict(grouped[cell]) for cell in sorted(grouped)}


def _figures(runs: Sequence[Run]) -> Figures:
    curves = [[e["pass_at_1"] for e in run["evaluations"]] for run in runs]
    areas = [_area([(e["step"], e["pass_at_1"]) for e in run["evaluations"]]) for run in runs]
    last = [_final(run) for run in runs]
    finals = [e["pass_at_1"] for e in last]
    return Figures(
        final=mean(finals),
        lowest=min(finals),
        highest=max(finals),
        best=mean(max(curve) for curve in curves),
        area=mean(areas),
        pass_at_16=mean(e["pass_at_16"] for e in last),
        unique=mean(e["unique_correct"] for e in last),
        entropy=mean(e["entropy"] for e in last),
        num_runs=len(runs),
        collapsed=sum(final < curve[0] for final, curve in zip(finals, curves, strict=True)),
    )


def _area(curve: Sequence[tuple[int, float]]) -> float:
    """Return the mean height of a curve of (step, value)."""
    total = sum((b[1] + a[1]) / 2 * (b[0] - a[0]) for a, b in pairwise(curve))
    return total / (curve[-1][0] - curve[0][0])


def _final(run: Run) -> dict[str, float]:
    points = run["evaluations"]
    last = [p for p in points[1:] if p["step"] >= (1 - _FINAL_PART) * points[-1]["step"]]
    return {name: mean(p[name] for p in last) for name in last[0]}


@dataclass(frozen=True)
class Pair:
    """A baseline in a cell, and QUATRO with its defaults on the same seeds."""

    key: tuple[str, bool]
    own: Figures
    rival: Figures

    def lead(self, figure: str) -> float:
        """Return how far the baseline is ahead."""
        return getattr(self.rival, figure) - getattr(self.own, figure)


def claims(runs: Iterable[Run]) -> dict[str, Any]:
    """Return what the study claims about QUATRO with its defaults, with every exception."""
    grouped = {cell: row for cell, row in _grouped(runs).items() if _OURS in row}
    own = {cell: _figures(row[_OURS]) for cell, row in grouped.items()}
    everyone = {cell: _pairs(row) for cell, row in grouped.items()}
    pairs = {cell: [p for p in of if p.key[0] != EARLIER] for cell, of in everyone.items()}
    long = {cell: [p for p in of if p.key == (EARLIER, True)] for cell, of in everyone.items() if "250" in cell.task}
    close = {cell: [p for p in of if abs(p.lead("final")) <= MARGIN] for cell, of in pairs.items()}
    collapsing = [(cell, p) for cell, of in pairs.items() for p in of if not p.key[1] and p.rival.collapsed]
    exceptions = {
        "never collapses": [_name(cell) for cell, f in own.items() if f.collapsed],
        "within 0.02 of the best in every cell": _ahead(pairs, "final", MARGIN),
        "above every baseline that collapses as published": [
            f"{_name(cell)}: {p.key[0]}" for cell, p in collapsing if p.lead("final") >= 0
        ]
        if any(not p.key[1] for of in pairs.values() for p in of)
        else [_NOT_RUN],
        "at 250 tokens above QUATRO with one budget": _ahead(long, "final", 0.0) if any(long.values()) else [_NOT_RUN],
        "highest entropy of those within 0.02": _ahead(close, "entropy", 0.0),
        "highest pass@16 of those within 0.02": _ahead(close, "pass_at_16", 0.0),
    }
    return {
        "holds": {claim: not found for claim, found in exceptions.items()},
        "num_cells": len(own),
        "num_runs": sum(len(of) for row in grouped.values() for of in row.values()),
        "num_seeds": max((f.num_runs for f in own.values()), default=0),
        "baseline_cells_collapsed": len(collapsing),
        "exceptions": exceptions,
    }


_OURS = ("quatro", True)
_NOT_RUN = "not run yet"


def _pairs(row: dict[tuple[str, bool], list[Run]]) -> list[Pair]:
    """Pair QUATRO with every baseline, with and without step control, on the seeds that both have."""
    pairs = []
    for key, theirs in row.items():
        seeds = {run["seed"] for run in theirs} & {run["seed"] for run in row[_OURS]}
        if key[0] in {*METHODS, EARLIER} - {_OURS[0]} and seeds:
            own, rival = ([run for run in of if run["seed"] in seeds] for of in (row[_OURS], theirs))
            pairs.append(Pair(key, _figures(own), _figures(rival)))
    return pairs


def _ahead(pairs: dict[Cell, list[Pair]], figure: str, margin: float) -> list[str]:
    """Return the cells in which a baseline exceeds QUATRO by more than the margin, with the leader and its lead."""
    found = []
    for cell, of in pairs.items():
        leads = [(p.lead(figure), p.key) for p in of]
        lead, (method, control) = max(leads, default=(0.0, ("", True)))
        if lead > margin:
            found.append(f"{_name(cell)}: {method}{'' if control else ', no control'} {lead:+.3f}")
    return found


def _name(cell: Cell) -> str:
    return f"{cell.task} s={cell.staleness} {cell.multiple}x"
