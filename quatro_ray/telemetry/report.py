"""The report: one self-contained HTML file with the summary, plots as inline SVG and a few rollouts."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_Record = dict[str, Any]
"""A line of a file of the run, which is JSON."""
_Get = Callable[[_Record], float | None]
"""Reads a value to plot from the metrics of a step; None if the step has none."""

_PHASE_COLOURS = {
    "wait": "#d9d9d9",
    "train": "#1f77b4",
    "sync": "#ff7f0e",
    "evaluate": "#2ca02c",
    "checkpoint": "#9467bd",
}
_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse}td,th{padding:.15em .8em;border-bottom:1px solid #ddd;text-align:left}"
    "svg{max-width:100%;height:auto}pre{background:#f6f6f6;padding:.6em;overflow:auto}"
    ".plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(26em,1fr));gap:1em}"
)


def write_report(run_dir: Path) -> Path:
    """Write report.html from the files of a finished run's directory alone; return its path."""
    import matplotlib

    matplotlib.use("svg")
    metrics = _read(run_dir / "metrics.jsonl")
    evaluations = _read(run_dir / "evaluations.jsonl")
    timeline = _read(run_dir / "timeline.jsonl")
    summary = json.loads((run_dir / "summary.json").read_text())
    plots = [
        _lines("Reward of the trained batch", metrics, {"mean reward": _scalar("reward/mean")}),
        _pass_rates(evaluations),
        _lines("Entropy, nats per token", metrics, {"entropy": _scalar("policy/entropy")}),
        _lines(
            "KL per query: realised against budget, nats",
            metrics,
            {
                "realised, mean": _mean("policy/realised_kl_nats"),
                "realised, largest": _largest("policy/realised_kl_nats"),
                "budget, mean": _mean("trust_region/kl_budget_nats"),
            },
        ),
        _lines(
            "Step control: KL of the optimiser's step over its budget, and what was kept",
            metrics,
            {"share of budget": _scalar("step_control/share_of_budget"), "kept": _scalar("step_control/kept")},
        ),
        _lines(
            "Queries by what bound their trust region",
            metrics,
            {name: _scalar(f"trust_region/frac_{name}") for name in ("active", "slack", "void")},
        ),
        _lines(
            "Effective sample size of the batch, and tokens limited by clip, cut or mask",
            metrics,
            {
                "effective share": _scalar("rollout_corr/eff_sample_size"),
                "limited share": _scalar("policy_gradient/limited_share"),
            },
        ),
        _histogram("Targets t", _flat(metrics, "trust_region/target_log_ratio"), "log π*/β, nats"),
        _histogram("Residuals t − log ρ", _flat(metrics, "trust_region/residual"), "nats"),
        _ratios(metrics),
        _histogram("η of informative queries", _flat(metrics, "trust_region/eta"), "1/λ, 1/reward"),
        _bars("Staleness of trained tokens", summary["staleness_tokens"], "learner version − token version"),
        _lines("Gradient norm", metrics, {"gradient norm": _scalar("step/grad_norm")}),
        _timeline(timeline),
    ]
    page = "\n".join(
        [
            "<!doctype html><html lang=en><meta charset=utf-8><title>quatro_ray run</title>",
            f"<style>{_STYLE}</style><h1>quatro_ray run: {html.escape(run_dir.name)}</h1>",
            _table(summary),
            "<h2>Plots</h2><div class=plots>",
            *plots,
            "</div><h2>Last rollouts</h2>",
            _rollouts(_read(run_dir / "rollouts.jsonl")[-3:]),
            f"<h2>Configuration</h2><pre>{html.escape((run_dir / 'config.yaml').read_text())}</pre></html>",
        ]
    )
    path = run_dir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _read(path: Path) -> list[_Record]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _scalar(key: str) -> _Get:
    return lambda m: m.get(key)


def _mean(key: str) -> _Get:
    return lambda m: sum(m[key]) / len(m[key]) if m.get(key) else None


def _largest(key: str) -> _Get:
    return lambda m: max(m[key]) if m.get(key) else None


def _flat(metrics: Sequence[_Record], key: str) -> list[float]:
    return [value for m in metrics for value in m.get(key, [])]


def _figure(title: str, xlabel: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.add_subplot(title=title, xlabel=xlabel)
    axes.grid(alpha=0.3)
    return figure, axes


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return f"<div>{text[text.index('<svg') :]}</div>"


def _lines(title: str, metrics: Sequence[_Record], series: Mapping[str, _Get]) -> str:
    figure, axes = _figure(title, "optimiser step")
    for label, get in series.items():
        points = [(m["step"], get(m)) for m in metrics if get(m) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, linewidth=1)
    if len(series) > 1:
        axes.set_yscale("symlog", linthresh=0.1)
    if len(axes.get_lines()) > 1:
        axes.legend()
    return _svg(figure)


def _pass_rates(evaluations: Sequence[_Record]) -> str:
    figure, axes = _figure("Held-out questions", "optimiser step")
    for name in dict.fromkeys(e["set"] for e in evaluations):
        of = [e for e in evaluations if e["set"] == name]
        for key in (key for key in of[0] if key.startswith("pass_at_") and key != "pass_at_1_error"):
            axes.plot([e["step"] for e in of], [e[key] for e in of], marker="o", label=f"{name} {key}")
    axes.set_ylim(0, 1.02)
    axes.legend()
    return _svg(figure)


def _histogram(title: str, values: Sequence[float], xlabel: str) -> str:
    figure, axes = _figure(title, xlabel)
    if values:
        axes.hist(values, bins=60)
        axes.set_yscale("log")
    return _svg(figure)


def _bars(title: str, counts: dict[str, int], xlabel: str) -> str:
    figure, axes = _figure(title, xlabel)
    axes.bar([int(k) for k in counts], list(counts.values()))
    axes.set_ylabel("tokens")
    return _svg(figure)


def _ratios(metrics: Sequence[_Record]) -> str:
    """Plot log π_θ/β of all trained tokens; bins as in engines/step_metrics.py, the middle one around 0."""
    counts = [sum(column) for column in zip(*(m["rollout_corr/log_ratio_tokens"] for m in metrics), strict=True)]
    figure, axes = _figure("Importance ratios of trained tokens", "log π_θ/β, nats; the ends hold all beyond")
    axes.bar([0.1 * (i - len(counts) // 2) for i in range(len(counts))], counts, width=0.09)
    axes.set_ylabel("tokens")
    axes.set_yscale("symlog")
    return _svg(figure)


def _timeline(timeline: Sequence[_Record]) -> str:
    """Plot the learner's phases as bars and the number of groups in each engine as lines."""
    from matplotlib.patches import Patch

    figure, axes = _figure("What learner and generators were doing", "seconds")
    for name, colour in _PHASE_COLOURS.items():
        spans = [(e["start"], e["end"] - e["start"]) for e in timeline if e.get("phase") == name]
        axes.broken_barh(spans, (-2.5, 2), color=colour, linewidth=0)
    for engine in sorted({e["role"] for e in timeline if "num_running" in e}):
        points = [(e["t"], e["num_running"]) for e in timeline if e["role"] == engine]
        axes.plot(*zip(*points, strict=True), label=engine, linewidth=0.8)
    axes.set_ylabel("groups in the engine")
    handles = [Patch(color=c, label=f"learner: {n}") for n, c in _PHASE_COLOURS.items()]
    axes.legend(
        handles=[*handles, *axes.get_lines()], fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.2)
    )
    return _svg(figure)


def _table(summary: _Record) -> str:
    rows = (f"<tr><th>{html.escape(k)}</th><td>{html.escape(_show(v))}</td></tr>" for k, v in summary.items())
    return "<table>" + "".join(rows) + "</table>"


def _show(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}: {_show(v)}" for k, v in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _rollouts(groups: Sequence[_Record]) -> str:
    return "".join(f"<pre>{html.escape(json.dumps(g, indent=1)[:2000])}</pre>" for g in groups)
