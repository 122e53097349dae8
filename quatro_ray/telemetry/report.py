"""The report: one self-contained HTML file with summary, plots as inline SVG, help for operators, and some rollouts."""

from __future__ import annotations

import html
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from quatro_ray.files import replace_file
from quatro_ray.telemetry.report_links import operator_section
from quatro_ray.telemetry.report_plots import sections
from quatro_ray.telemetry.report_rollouts import rollouts
from quatro_ray.telemetry.run_files import Record, RunFiles, newest_change, read_run, require_run

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:75em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse}td,th{padding:.15em .8em;border-bottom:1px solid #ddd;text-align:left;"
    "vertical-align:top;overflow-wrap:anywhere}th{white-space:nowrap}"
    "svg{width:100%;height:auto;display:block}figure{margin:0;min-width:0}figcaption{font-weight:600}"
    "pre{background:#f6f6f6;padding:.6em;white-space:pre-wrap;overflow-wrap:anywhere}"
    "summary{cursor:pointer}.status{font-weight:600}.problem{color:#b00020}"
    ".plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(26em,100%),1fr));gap:1.5em}"
)
_GIB = 2**30


def write_report(run_dir: Path, *, refresh_s: float | None = None) -> Path:
    """Write report.html from the files of a run's directory alone; return its path.

    The run may be finished, still running, or crashed. The file is replaced as a whole, so no browser sees half of it.

    Args:
        run_dir: directory of the run.
        refresh_s: seconds after which a browser loads the page again, until the run is finished.

    Raises:
        ConfigError: the directory holds no run.
    """
    import matplotlib

    require_run(run_dir)
    matplotlib.use("svg")
    run = read_run(run_dir)
    path = run_dir / "report.html"
    replace_file(path, _page(run_dir, run, refresh_s if run.summary is None else None))
    return path


def watch_report(run_dir: Path, every_s: float, sleep: Callable[[float], None] = time.sleep) -> Path:
    """Write the report again whenever the run has written records, until it is finished; return the report's path.

    Args:
        run_dir: directory of the run.
        every_s: seconds between two looks at the files.
        sleep: waits that long.

    Raises:
        ConfigError: the directory holds no run.
    """
    written_for = -1.0
    while True:
        changed = newest_change(run_dir)
        if changed != written_for:
            path = write_report(run_dir, refresh_s=every_s)
            written_for = changed
            if read_run(run_dir).summary is not None:
                return path
        sleep(every_s)


def _page(run_dir: Path, run: RunFiles, refresh_s: float | None) -> str:
    refresh = f'<meta http-equiv="refresh" content="{refresh_s:g}">' if refresh_s else ""
    parts = [
        '<!doctype html><html lang=en><meta charset=utf-8><meta name="viewport" content="width=device-width">',
        f"{refresh}<title>quatro_ray run: {html.escape(run.name)}</title><style>{_STYLE}</style>",
        f"<h1>quatro_ray run: {html.escape(run.name)}</h1>",
        _status(run),
        _table(run.summary or _progress(run)),
    ]
    if run.summary is None and run.notes:
        parts.append(f"<h2>Last notes</h2><pre>{html.escape(chr(10).join(run.notes))}</pre>")
    for title, drawn in sections(run):
        parts.append(f"<h2>{title}</h2><div class=plots>{''.join(drawn)}</div>")
    parts.append(operator_section(run_dir, run))
    if run.rollouts:
        parts.append("<h2>Last rollouts</h2>" + "".join(map(rollouts, run.rollouts)))
    parts.append(f"<h2>Configuration</h2><pre>{html.escape(run.config)}</pre></html>")
    return "\n".join(parts)


def _status(run: RunFiles) -> str:
    if run.summary is not None:
        status = "The run is finished."
    else:
        last = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(run.changed_at)) if run.changed_at else "never"
        of = f" of {run.num_steps}" if run.num_steps is not None else ""
        status = f"The run is not finished: step {run.last_step}{of}, last record {last}."
    lines = [f"<p class=status>{status}</p>"]
    for name, num in run.unreadable.items():
        lines.append(f"<p class='status problem'>{num} lines of {name} could not be read and are left out.</p>")
    return "".join(lines)


def _progress(run: RunFiles) -> Record:
    """Return what is known of a run without a summary, in the words of summary.json where it has them."""
    if not run.metrics:
        return {"learner_steps": 0}
    first, last = run.metrics[0], run.metrics[-1]
    staleness: Counter[int] = Counter()
    for step in run.metrics:
        staleness.update({int(k): n for k, n in (step.get("off_policy/staleness_tokens") or {}).items()})
    evaluations: dict[str, Record] = {e["set"]: e for e in run.evaluations}
    return {
        "learner_steps": last["step"],
        "reward": {f"step {first['step']}": first.get("reward/mean"), f"step {last['step']}": last.get("reward/mean")},
        **({"evaluations": evaluations} if evaluations else {}),
        "skipped_steps": sum(int(step.get("step/skipped", 0)) for step in run.metrics),
        "uninformative_steps": sum(int(step.get("step/uninformative", 0)) for step in run.metrics),
        "trained_tokens": sum(step.get("tokens/trained", 0) for step in run.metrics),
        "staleness_tokens": {str(k): n for k, n in sorted(staleness.items())},
        "seconds": {"total": last.get("time_s")},
    }


def _table(summary: Record) -> str:
    rows = (f"<tr><th>{html.escape(_label(k))}</th><td>{_cell(k, v)}</td></tr>" for k, v in summary.items())
    return "<table>" + "".join(rows) + "</table>"


def _label(key: str) -> str:
    return key.removesuffix("_bytes")


def _cell(key: str, value: object) -> str:
    if isinstance(value, Mapping) and value and all(isinstance(v, Mapping) for v in value.values()):
        return "<br>".join(f"<b>{html.escape(str(k))}</b>: {html.escape(_show(key, v))}" for k, v in value.items())
    return html.escape(_show(key, value))


def _show(key: str, value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k}: {_show(key if key.endswith('_bytes') else str(k), v)}" for k, v in value.items())
    if key.endswith("_bytes") and isinstance(value, int | float):
        return f"{value / _GIB:.2f} GiB"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
