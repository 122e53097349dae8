"""report.html is made from the files of a run alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quatro_ray.telemetry.console import Progress
from quatro_ray.telemetry.recorder import Recorder
from quatro_ray.telemetry.report import write_report
from quatro_ray.types import EngineLoad, EvaluationResult, StepMetrics


def metrics(step: int) -> StepMetrics:
    return {
        "reward/mean": 0.1 * step,
        "policy/entropy": 1.0,
        "policy/realised_kl_nats": [0.01, 0.02],
        "trust_region/kl_budget_nats": [0.05, 0.05],
        "off_policy/staleness_mean": 1.0,
        "off_policy/staleness_max": 2.0,
        "step/skipped": 0.0,
        "step/grad_norm": 0.5,
        "rollout_corr/log_ratio_tokens": [1.0, 5.0, 1.0],
    }


def write_run(path: Path, num_steps: int = 2, response: str = "4") -> Path:
    """A finished run, written by the recorder itself."""
    path.mkdir()
    recorder = Recorder(path, num_steps=num_steps, tensorboard=False, progress=Progress())
    recorder.evaluation(EvaluationResult("sums", 0, 0, 4, 8, {1: 0.25, 8: 0.5}, 0.1, 0.5, 3, 0.4, 0.0, 64))
    for step in range(1, num_steps + 1):
        with recorder.phase("learner", "train"):
            recorder.engine_load(0, EngineLoad(3, 10, 12, is_alive=True))
        recorder.step(step, metrics(step), [{"group_id": step, "rollouts": [{"text": response, "reward": 1.0}]}])
    recorder.close()
    summary: dict[str, Any] = {"pass_at_1_end": 0.123456, "staleness_tokens": {"0": 10, "2": 5}, "drops": {"stale": 3}}
    (path / "summary.json").write_text(json.dumps(summary))
    (path / "config.yaml").write_text("run:\n  dir: <here>\n")
    return path


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report of a run of five steps whose texts look like HTML."""
    run = write_run(tmp_path_factory.mktemp("report") / "<b>run", num_steps=5, response="<script>alert(1)</script>")
    report = write_report(run)
    assert report == run / "report.html"
    return report.read_text()


def test_it_holds_numbers_plots_and_the_configuration(page: str) -> None:
    assert "<th>pass_at_1_end</th><td>0.1235</td>" in page
    assert "<td>stale: 3</td>" in page
    assert page.count("<svg") == 14
    for title in ("Reward of the trained batch", "Held-out questions", "Staleness of trained tokens"):
        assert f"<!-- {title} -->" in page
    assert "<!-- generator 0 -->" in page and "<!-- learner: train -->" in page
    assert "dir: &lt;here&gt;" in page


def test_it_needs_no_other_file(page: str) -> None:
    assert "<script" not in page and "<link" not in page and 'src="' not in page


def test_text_of_the_run_is_escaped(page: str) -> None:
    assert "&lt;script&gt;alert(1)" in page
    assert "quatro_ray run: &lt;b&gt;run" in page


def test_the_last_three_rollouts_are_shown(page: str) -> None:
    shown = [f"&quot;group_id&quot;: {i}" in page for i in range(1, 6)]
    assert shown == [False, False, True, True, True]


def test_metrics_that_a_step_lacks_leave_their_plot_empty(tmp_path: Path) -> None:
    """An objective without a trust region, and a batch without tokens of its own version."""
    run = write_run(tmp_path / "run")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    del lines[0]["trust_region/kl_budget_nats"]
    lines[1]["policy/realised_kl_nats"] = []
    lines[1]["step/grad_norm"] = None
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "<svg" in write_report(run).read_text()
