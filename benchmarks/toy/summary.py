"""From runs to the figures of a cell, and whether they bear out what the study is to show."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import mean
from typing import Any

from benchmarks.toy.grid import CORNERS, WHOLE_GRID

Run = Mapping[str, Any]
MARGIN = 0.02


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


Table = dict[Cell, dict[tuple[str, bool], Figures]]
"""By cell, then by method and whether it had step control."""


def tabulate(runs: Iterable[Run]) -> Table:
    grouped: defaultdict[Cell, defaultdict[tuple[str, bool], list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        cell = Cell(run["task"], run["staleness"], run["multiple"])
        grouped[cell][run["method"], run["control"]].append(run)
    return {cell: {key: _figures(group) for key, group in grouped[cell].items()} for cell in sorted(grouped)}


def _figures(runs: Sequence[Run]) -> Figures:
    curves = [[e["pass_at_1"] for e in run["evaluations"]] for run in runs]
    last = [run["evaluations"][-1] for run in runs]
    finals = [curve[-1] for curve in curves]
    return Figures(
        final=mean(finals),
        lowest=min(finals),
        highest=max(finals),
        best=mean(max(curve) for curve in curves),
        area=mean(mean((a + b) / 2 for a, b in pairwise(curve)) for curve in curves),
        pass_at_16=mean(e["pass_at_16"] for e in last),
        unique=mean(e["unique_correct"] for e in last),
        entropy=mean(e["entropy"] for e in last),
        num_runs=len(runs),
        collapsed=sum(curve[-1] < curve[0] for curve in curves),
    )


def claims(table: Table) -> dict[str, Any]:
    """What the study is to show about QUATRO with its defaults, with every exception."""
    quatro = {cell: row["quatro", True] for cell, row in table.items() if ("quatro", True) in row}
    rivals = {cell: _rivals(table[cell]) for cell in quatro}
    collapses = [_name(c) for c, f in quatro.items() if f.collapsed]
    behind = {
        _name(c): f"{key[0]}{'' if key[1] else ', no control'} {ahead:+.3f}"
        for c, f in quatro.items()
        for key, ahead in [max(((k, r.final - f.final) for k, r in rivals[c].items()), key=lambda x: x[1])]
        if ahead > MARGIN
    }
    not_above = [
        f"{_name(c)}: {key[0]}"
        for c, f in quatro.items()
        for key, r in rivals[c].items()
        if not key[1] and r.collapsed and r.final >= f.final
    ]
    close = {c: [r for r in rivals[c].values() if abs(r.final - f.final) <= MARGIN] for c, f in quatro.items()}
    less_entropy = [_name(c) for c, f in quatro.items() if any(r.entropy > f.entropy for r in close[c])]
    less_pass_16 = [_name(c) for c, f in quatro.items() if any(r.pass_at_16 > f.pass_at_16 for r in close[c])]
    exceptions = {
        "never collapses": collapses,
        "within 0.02 of the best in every cell": [f"{cell}: {who}" for cell, who in behind.items()],
        "above every baseline that collapses as published": not_above,
        "highest entropy of those within 0.02": less_entropy,
        "highest pass@16 of those within 0.02": less_pass_16,
    }
    return {
        "holds": {claim: not found for claim, found in exceptions.items()},
        "num_cells": len(quatro),
        "num_runs": sum(f.num_runs for row in table.values() for f in row.values()),
        "num_seeds": max((f.num_runs for f in quatro.values()), default=0),
        "baseline_cells_collapsed": sum(
            bool(r.collapsed) for c in quatro for key, r in rivals[c].items() if not key[1]
        ),
        "exceptions": exceptions,
    }


def _rivals(row: dict[tuple[str, bool], Figures]) -> dict[tuple[str, bool], Figures]:
    """All that is not QUATRO, with step control and without."""
    return {key: f for key, f in row.items() if key[0] in {*WHOLE_GRID, *CORNERS} - {"quatro"}}


def _name(cell: Cell) -> str:
    return f"{cell.task} s={cell.staleness} {cell.multiple}x"
