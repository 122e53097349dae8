"""Draws plots as inline SVG. A plot without data is None. Titles are HTML, so that they wrap and can be searched."""

from __future__ import annotations

import html
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from quatro_ray.telemetry.length_bins import bin_width
from quatro_ray.telemetry.record_types import number
from quatro_ray.telemetry.run_files import Record

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Get = Callable[[Record], float | None]
"""Reads a value to plot from the metrics of a step; None if the step has none."""
Scale = Literal["linear", "from_zero", "share", "log"]
"""Vertical axis. from_zero: linear from 0 up. share: linear from 0 to 1. log: linear close to 0 if values reach it."""

_MAX_MARKED = 40
_SHORT_NAME = 20
_MAX_NAME = 40
_LINEAR_BELOW = 0.1
_RATIO_BIN_NATS = 0.1
_PHASE_COLOURS = {
    "wait": "#d9d9d9",
    "train": "#1f77b4",
    "sync": "#ff7f0e",
    "evaluate": "#2ca02c",
    "export": "#8c564b",
    "checkpoint": "#9467bd",
    "busy": "#1f77b4",
    "paused": "#ff7f0e",
    "wait_weights": "#ffbb78",
    "start": "#bcbd22",
    "evaluation": "#2ca02c",
    "lost": "#d62728",
    "restart": "#d62728",
    "idle": "#f0f0f0",
}
_OTHER_COLOUR = "#17becf"


def scalar(key: str) -> Get:
    """Return a reader of a metric that is a number."""
    return lambda m: number(m, key)


def mean(key: str) -> Get:
    """Return a reader of the mean of a metric that is a list."""
    return lambda m: sum(m[key]) / len(m[key]) if m.get(key) else None


def largest(key: str) -> Get:
    """Return a reader of the largest value of a metric that is a list."""
    return lambda m: max(m[key]) if m.get(key) else None


def lines(
    title: str, metrics: Sequence[Record], series: Mapping[str, Get], unit: str = "", *, scale: Scale = "linear"
) -> str | None:
    """Plot values over optimiser steps, one line for each series that has any."""
    points = {label: found for label, get in series.items() if (found := _points(metrics, get))}
    return _over_steps(title, points, unit, scale, is_named=len(series) > 1)


def pass_rates(title: str, evaluations: Sequence[Record]) -> str | None:
    """Plot pass@k of every held-out set over optimiser steps."""
    series: dict[str, list[tuple[int, float]]] = {}
    for e in evaluations:
        for key in (key for key in e if key.startswith("pass_at_")):
            if (share := number(e, key)) is not None:
                series.setdefault(f"{e['set']} {key.replace('_at_', '@')}", []).append((e["step"], share))
    return _over_steps(title, series, "", "share", is_named=True)


def histogram(title: str, values: Iterable[float], xlabel: str) -> str | None:
    """Plot how often values occur, on a logarithmic vertical axis."""
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return None
    figure, axes = _figure(xlabel, "number")
    axes.hist(finite, bins=60)
    axes.set_yscale("log")
    return _svg(title, figure)


def bars(title: str, counts: Mapping[int, int], xlabel: str, ylabel: str) -> str | None:
    """Plot counts by a whole number, such as an age."""
    if not counts:
        return None
    figure, axes = _figure(xlabel, ylabel)
    axes.bar(list(counts), list(counts.values()), width=0.9)
    axes.locator_params(axis="x", integer=True)
    return _svg(title, figure)


def lengths(title: str, counts: Mapping[int, int]) -> str | None:
    """Plot a histogram of lengths in tokens by the smallest length of each bin (telemetry/length_bins.py).

    The area of a bar is the number in its bin, so that wide bins do not look fuller than narrow ones.
    """
    if not counts:
        return None
    figure, axes = _figure("tokens", "number per token of length")
    widths = [bin_width(k) for k in counts]
    heights = [n / width for n, width in zip(counts.values(), widths, strict=True)]
    axes.bar(list(counts), heights, width=widths, align="edge")
    return _svg(title, figure)


def categories(title: str, values: Mapping[str, float], xlabel: str, *, scale: Scale = "linear") -> str | None:
    """Plot one horizontal bar for each name, from the top down, with its value."""
    if not values:
        return None
    figure, axes = _figure(xlabel, "")
    drawn = axes.barh([_short(name) for name in values], list(values.values()))
    axes.bar_label(drawn, fmt="%.3g", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    if scale == "share":
        axes.set_xlim(0, 1.15)
    return _svg(title, figure)


def ratios(title: str, metrics: Sequence[Record]) -> str | None:
    """Plot log π_θ/β of all trained tokens; bins as in engines/step_metrics.py, the middle one around 0."""
    rows = [m["rollout_corr/log_ratio_tokens"] for m in metrics if m.get("rollout_corr/log_ratio_tokens")]
    counts = [sum(column) for column in zip(*rows, strict=True)]
    if not counts:
        return None
    figure, axes = _figure("log π_θ/β, nats; the ends hold all beyond", "tokens")
    axes.bar([_RATIO_BIN_NATS * (i - len(counts) // 2) for i in range(len(counts))], counts, width=0.09)
    axes.set_yscale("symlog")
    return _svg(title, figure)


def stacked(title: str, metrics: Sequence[Record], prefix: str) -> str | None:
    """Plot the metrics whose names begin with `prefix`, shares that add up to 1, on top of each other over steps."""
    steps = [m for m in metrics if any(key.startswith(prefix) for key in m)]
    names = dict.fromkeys(key for m in steps for key in m if key.startswith(prefix))
    if not steps:
        return None
    figure, axes = _figure("optimiser step", "share of the time")
    states = [name.removeprefix(prefix) for name in names]
    colours = [_PHASE_COLOURS.get(state, _OTHER_COLOUR) for state in states]
    bottom = [0.0] * len(steps)
    for name, state, colour in zip(names, states, colours, strict=True):
        heights = [number(m, name) or 0.0 for m in steps]
        axes.bar([m["step"] for m in steps], heights, width=1.0, bottom=bottom, color=colour, label=state)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.set_ylim(0, 1)
    axes.locator_params(axis="x", integer=True)
    figure.legend(fontsize=8, ncols=4, loc="outside lower center")
    return _svg(title, figure)


def timeline(title: str, records: Sequence[Record]) -> str | None:
    """Plot the learner's phases as bars and the number of groups in each engine as lines."""
    from matplotlib.patches import Patch

    if not records:
        return None
    figure, axes = _figure("seconds", "groups in the engine")
    handles: list[Artist] = []
    for name, colour in _PHASE_COLOURS.items():
        of_learner = [e for e in records if e.get("phase") == name and e["role"] == "learner"]
        spans = [(e["start"], e["end"] - e["start"]) for e in of_learner]
        if spans:
            axes.broken_barh(spans, (-2.5, 2), color=colour, linewidth=0)
            handles.append(Patch(color=colour, label=f"learner: {name}"))
    for engine in sorted({e["role"] for e in records if "num_running" in e}):
        points = [(e["t"], e["num_running"]) for e in records if e["role"] == engine and "num_running" in e]
        axes.plot(*zip(*points, strict=True), label=engine, linewidth=0.8)
    handles += axes.get_lines()
    figure.legend(handles=handles, fontsize=8, ncols=3, loc="outside lower center")
    return _svg(title, figure)


def _points(metrics: Sequence[Record], get: Get) -> list[tuple[int, float]]:
    values = ((m["step"], get(m)) for m in metrics)
    return [(step, value) for step, value in values if value is not None and math.isfinite(value)]


def _over_steps(
    title: str, series: Mapping[str, Sequence[tuple[int, float]]], unit: str, scale: Scale, *, is_named: bool
) -> str | None:
    if not series:
        return None
    figure, axes = _figure("optimiser step", unit)
    for label, points in series.items():
        marker = "o" if len(points) <= _MAX_MARKED else ""  # one point alone makes no line
        axes.plot(*zip(*points, strict=True), label=_short(label), linewidth=1, marker=marker, markersize=3)
    axes.set_xlim(0, 1.03 * max(step for points in series.values() for step, _ in points) or 1)
    axes.locator_params(axis="x", integer=True)
    _set_scale(axes, scale, [value for points in series.values() for _, value in points])
    if is_named:
        num_columns = 3 if max(map(len, series)) < _SHORT_NAME else 1
        figure.legend(fontsize=8, ncols=num_columns, loc="outside lower center")
    return _svg(title, figure)


def _set_scale(axes: Axes, scale: Scale, values: Sequence[float]) -> None:
    if scale == "share":
        axes.set_ylim(-0.02, 1.02)
    elif scale == "from_zero":
        axes.set_ylim(0, 1.05 * max(values) or 1)
    elif scale == "log" and min(values) > 0:
        axes.set_yscale("log")
    elif scale == "log":
        axes.set_yscale("symlog", linthresh=_LINEAR_BELOW)


def _short(name: str) -> str:
    """Return a name, which a user chose, as a label.

    It leaves room for the plot, no dollar sign in it begins a formula, and no underscore hides it from the legend.
    """
    short = name if len(name) <= _MAX_NAME else f"{name[: _MAX_NAME - 1]}…"
    return (f" {short}" if short.startswith("_") else short).replace("$", r"\$")


def _figure(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.3)
    return figure, axes


def _svg(title: str, figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    drawn = buffer.getvalue()
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{drawn[drawn.index('<svg') :]}</figure>"
