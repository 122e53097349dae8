"""The study as Markdown tables and SVG plots, from its runs alone."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.toy.grid import EARLIER, METHODS, MULTIPLES, SEEDS, STALENESS, TASKS, all_specs
from benchmarks.toy.summary import Cell, Figures, Run, Table, claims, tabulate

_BEGIN, _END = "<!-- study: begin -->", "<!-- study: end -->"
_ALL = (*METHODS, EARLIER)
_LEAD = re.compile(r" [+-]\d\.\d+$")
_COLOURS = {method: f"C{i}" for i, method in enumerate(_ALL)}


def write_report(runs: Sequence[Run], docs: Path) -> dict[str, Any]:
    """Replace the section of docs/results.md between the study's marks, and its plots; return the claims.

    Raises:
        ValueError: there is no run, or results.md has no marks.
    """
    if not runs:
        raise ValueError("there are no figures yet: `python -m benchmarks.study run` makes them")
    path = docs / "results.md"
    before, begin, rest = path.read_text().partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError(f"{path} must hold the lines {_BEGIN} and {_END}")
    table = tabulate(runs)
    found = claims(runs)
    plots = docs / "plots"
    plots.mkdir(exist_ok=True)
    for task in TASKS:
        _plot_staleness(table, task, plots / f"study_{task}.svg")
    _plot_frontier(table, plots / "study_entropy.svg")
    path.write_text(before + begin + "\n" + "\n".join(_sections(runs, table, found)) + end + after)
    return found


def _sections(runs: Sequence[Run], table: Table, found: dict[str, Any]) -> Iterable[str]:
    commits = ", ".join(f"`{c}`" for c in sorted({run["commit"] for run in runs}))
    hours = sum(run["seconds"] for run in runs) / 3600
    yield (
        f"{sum(run['method'] in METHODS for run in runs)} of {len(all_specs())} runs are done; seeds of a cell: up to "
        f"{found['num_seeds']} of {len(SEEDS)}. Commit {commits}, {platform.machine()}, {os.cpu_count()} cores, "
        f"{hours:.1f} core-hours.\n"
    )
    yield "| QUATRO with its defaults | holds | exceptions |\n|---|---|---|"
    for claim, exceptions in found["exceptions"].items():
        shown = "; ".join(exceptions)
        if len(exceptions) > 6:
            leads = [exception for exception in exceptions if _LEAD.search(exception)]
            most = f"; by most in {max(leads, key=_lead)}" if leads else ""
            shown = f"{len(exceptions)} exceptions in {found['num_cells']} cells{most}"
        yield f"| {claim} | {'no' if exceptions else 'yes'} | {shown} |"
    yield f"\nBaselines without control collapse in {found['baseline_cells_collapsed']} pairs of method and cell.\n"
    for task in TASKS:
        yield f"![final pass@1 by staleness](plots/study_{task}.svg)\n"
    yield "![entropy against pass@1](plots/study_entropy.svg)\n"
    for task in TASKS:
        for control in (True, False):
            yield _grid(table, task, control)
    yield ""


def _lead(exception: str) -> float:
    """Parse the lead, 0.031, from an exception such as `cell: method +0.031`."""
    return float(exception.rpartition(" ")[2])


def _show(f: Figures | None, most: int) -> str:
    """Format the figures of a method in a cell; `most`: seeds of the method that has most there."""
    if f is None:
        return "–"
    collapsed = f" †{f.collapsed}" if f.collapsed else ""
    return f"{f.final:.3f} / {f.pass_at_16:.3f} / {f.entropy:.2f}{collapsed}" + f" ({f.num_runs})" * (f.num_runs < most)


def _grid(table: Table, task: str, control: bool) -> str:
    cells = [c for c, row in table.items() if c.task == task and any((m, control) in row for m in _ALL)]
    if not cells:
        return ""
    what = "with step control" if control else "without step control, as published"
    lines = [
        f"\n**{task}, {what}**: final pass@1 / pass@16 / entropy in nats a token, means over seeds; †n: n runs "
        "ended below their start; (n): n seeds, where others have more, so not comparable.\n",
        "| | " + " | ".join(f"s = {c.staleness}, {c.multiple}×" for c in cells) + " |",
        "|---|" + "---|" * len(cells),
    ]
    most = {c: max(f.num_runs for f in table[c].values()) for c in cells}
    for method in _ALL:
        shown = [_show(table[c].get((method, control)), most[c]) for c in cells]
        lines.append(f"| {method} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _figure(columns: int) -> tuple[Any, list[Any]]:
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["svg.hashsalt"] = "quatro_ray"  # the same data give the same file
    figure = Figure(figsize=(4.2 * columns, 3.6), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def _plot_staleness(table: Table, task: str, path: Path) -> None:
    from matplotlib.lines import Line2D

    figure, panels = _figure(len(MULTIPLES))
    for axes, multiple in zip(panels, MULTIPLES, strict=True):
        axes.set(title=f"{task}, learning rate {multiple}×", xlabel="staleness, steps", ylabel="final pass@1")
        for method in _ALL:
            for control, style in ((True, "-o"), (False, ":s")):
                cells = [Cell(task, s, multiple) for s in STALENESS]
                points = [
                    (i, table[c][method, control].final)
                    for i, c in enumerate(cells)
                    if (method, control) in table.get(c, {})
                ]
                if points:
                    axes.plot(*zip(*points, strict=True), style, color=_COLOURS[method], markersize=4)
        axes.set_xticks(range(len(STALENESS)), [str(s) for s in STALENESS])
        axes.grid(alpha=0.3)
    lines = [Line2D([], [], color=colour, label=method) for method, colour in _COLOURS.items()]
    styles = [Line2D([], [], color="grey", linestyle=s, label=n) for s, n in (("-", "control"), (":", "no control"))]
    panels[-1].legend(handles=[*lines, *styles], fontsize=6)
    figure.savefig(path, metadata={"Date": None})


def _plot_frontier(table: Table, path: Path) -> None:
    figure, panels = _figure(len(TASKS))
    for axes, task in zip(panels, TASKS, strict=True):
        axes.set(title=f"{task}, step control on: every cell", xlabel="final pass@1", ylabel="entropy, nats a token")
        for method in _ALL:
            of = [row[method, True] for cell, row in table.items() if cell.task == task and (method, True) in row]
            axes.scatter([f.final for f in of], [f.entropy for f in of], s=18, color=_COLOURS[method], label=method)
        axes.grid(alpha=0.3)
    panels[-1].legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None})
