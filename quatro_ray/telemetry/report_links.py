"""The part of the report for those who operate the run: its faults, where else to look, and the commands for it."""

from __future__ import annotations

import html
import re
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

from quatro_ray.telemetry.append_log import last_lines
from quatro_ray.telemetry.run_files import RunFiles, count_faults

FILES = {
    "notes.log": "failures and retries, in words",
    "events.jsonl": "losses, recoveries, checkpoints",
    "stall.txt": "stacks of all parts after a stall",
    "metrics.jsonl": "one line per step",
    "evaluations.jsonl": "held-out results",
    "rollouts.jsonl": "groups of each step, as text",
    "timeline.jsonl": "what each part did and when",
    "trace.json": "the same for Perfetto",
    "config.yaml": "the resolved configuration",
    "checkpoints/": "checkpoints in DeepSpeed's format",
    "export/": "the last checkpoint in Hugging Face format",
    "tensorboard/": "scalars for TensorBoard",
}
"""Files of a run directory that the report links to if they are there."""
_PLACE = re.compile(r" s  (metrics for Prometheus|tracker \w+): (?!(?:failed|given up|incomplete) \()(.*)")
_NUM_FAULTS, _NUM_NOTES = 10, 1_000_000


def operator_section(run_dir: Path, run: RunFiles) -> str:
    """Return the section as HTML. Its links are relative: they work while the report is in the run directory."""
    parts = ["<h2>Operations</h2>", _faults(run), "<ul>", *_links(run_dir), *_places(run_dir), "</ul>"]
    commands = "\n".join(_commands(run_dir, is_finished=run.summary is not None))
    return "".join([*parts, f"<pre>{html.escape(commands)}</pre>"])


def _faults(run: RunFiles) -> str:
    if not run.faults:
        return "<p>No faults.</p>"
    total = ", ".join(f"{what.replace('_', ' ')}: {n:,}" for what, n in sorted(count_faults(run.faults).items()))
    last = "\n".join(
        " ".join([_clock(fault.get("clock_s")), fault["part"], fault["event"], fault.get("why") or ""])
        for fault in run.faults[-_NUM_FAULTS:]
    )
    return f"<p>Faults since the run began: {html.escape(total)}. The last ones:</p><pre>{html.escape(last)}</pre>"


def _clock(clock_s: float | None) -> str:
    if clock_s is None:
        return "at some time"
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(clock_s))


def _links(run_dir: Path) -> Iterator[str]:
    for name, what in FILES.items():
        if (run_dir / name).exists():
            yield f'<li><a href="{name}">{name}</a>: {what}</li>'


def _places(run_dir: Path) -> Iterator[str]:
    """Yield where the run is shown besides, as notes.log tells: the newest line of each kind."""
    lines = last_lines(run_dir / "notes.log", _NUM_NOTES)
    found = {match[1]: match[2] for line in lines if (match := _PLACE.search(line))}
    for what, place in found.items():
        yield f"<li>{html.escape(f'{what}: {place}')}</li>"


def _commands(run_dir: Path, *, is_finished: bool) -> Iterator[str]:
    run_dir = run_dir.absolute()  # the page is read elsewhere
    path = shlex.quote(str(run_dir))
    if not is_finished:
        yield f"quatro-ray status {path} --watch"
        yield f"quatro-ray train {shlex.quote(str(run_dir / 'config.yaml'))} run.resume=auto run.overwrite=false"
    yield f"quatro-ray audit {path}"
    yield f"quatro-ray trace {path}"
