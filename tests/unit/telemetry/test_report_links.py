"""The report's part for operators: faults, links to files that are there, other places, commands."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from quatro_ray.telemetry import report
from quatro_ray.telemetry.report import write_report
from quatro_ray.telemetry.report_links import FILES
from tests.unit.telemetry.run_maker import write_run

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "sections", lambda run: [])


def section(run: Path) -> str:
    found = re.search("<h2>Operations</h2>(.*?)<h2>", write_report(run).read_text(), re.DOTALL)
    assert found
    return found[1]


def test_links_are_to_files_that_are_there(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_steps=2)
    linked = re.findall('href="(.*?)"', section(run))
    assert {"metrics.jsonl", "config.yaml"} <= set(linked) <= set(FILES)
    assert all((run / name).exists() for name in linked) and "trace.json" not in linked
    (run / "trace.json").write_text("{}")
    assert 'href="trace.json"' in section(run)


def test_each_file_is_documented() -> None:
    documented = (ROOT / "docs/run_directory.md").read_text()
    assert [name for name in FILES if f"`{name}`" not in documented] == []


def test_faults_are_counted_and_the_last_ones_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_steps=2)
    assert "No faults." in section(run)
    lost = [{"event": "lost", "part": f"generator {i}", "why": "<gone>", "clock_s": 60.0 * i} for i in range(12)]
    events = [*lost, {"event": "given_up", "part": "generator 11"}, {"event": "written", "part": "checkpoint"}]
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    shown = section(run)
    assert "generator given up: 1, generator lost: 12" in shown
    assert "1970-01-01 00:11:00 UTC generator 11 lost &lt;gone&gt;" in shown and "generator 2 lost" not in shown
    assert "checkpoint" not in shown.partition("<ul>")[0]


def test_other_places_are_those_that_the_run_noted_last(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_steps=2)
    lines = [
        "   1.0 s  metrics for Prometheus: http://127.0.0.1:1/metrics",
        "   2.0 s  tracker wandb: https://example.com/run?a=1&b=2",
        "   1.5 s  metrics for Prometheus: http://127.0.0.1:2/metrics",
        "   3.0 s  generator 0: lost",
        "   4.0 s  tracker wandb: failed (why on_metrics: no answer)",
        *(f"{i:6}.0 s  note" for i in range(5, 3000)),
    ]
    (run / "notes.log").write_text("\n".join(lines) + "\n")
    assert "<li>metrics for Prometheus: http://127.0.0.1:2/metrics</li>" in section(run)
    assert "<li>tracker wandb: https://example.com/run?a=1&amp;b=2</li>" in section(run)
    assert "lost" not in section(run)


def test_commands_are_those_for_the_state_of_the_run(tmp_path: Path) -> None:
    finished = section(write_run(tmp_path / "a run", num_steps=2))
    assert "quatro-ray audit" in finished and "run.resume" not in finished
    running = section(write_run(tmp_path / "b run", num_steps=2, finished=False))
    path = f"&#x27;{tmp_path / 'b run'}"
    assert f"quatro-ray status {path}&#x27; --watch" in running
    assert f"quatro-ray train {path}/config.yaml&#x27; run.resume=auto" in running
