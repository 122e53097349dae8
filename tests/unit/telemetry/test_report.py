"""report.html is made from the files of a run alone, whether it is finished, running or crashed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from quatro_ray.errors import ConfigError
from quatro_ray.telemetry import plots, report
from quatro_ray.telemetry.report import watch_report, write_report
from tests.unit.telemetry.run_maker import LONG_NAME, write_run


def titles(page: str) -> list[str]:
    return re.findall("<figcaption>(.*?)</figcaption>", page)


def change_metrics(run: Path, *keys: str) -> None:
    """Remove these metrics from every step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if k not in keys} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The report of a run of five steps whose texts look like HTML."""
    run = write_run(tmp_path_factory.mktemp("report") / "<b>run", num_steps=5, response="<script>alert(1)</script>")
    report = write_report(run)
    assert report == run / "report.html"
    return report.read_text()


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what takes seconds to draw, for tests of the rest of the page."""
    monkeypatch.setattr(report, "sections", lambda run: [])


def test_it_holds_numbers_plots_and_the_configuration(page: str) -> None:
    assert "The run is finished." in page
    assert "<th>pass_at_1_end</th><td>0.1235</td>" in page
    assert "<td>stale: 3</td>" in page and "<td>1,234,567</td>" in page
    assert page.count("<svg") == len(titles(page)) == len(set(titles(page)))
    assert {
        "Reward of the trained batch",
        "Reward by source",
        "Held-out questions",
        "Response length",
        "Responses that were trained, by length",
        "Mean response length: trained against dropped",
        "Pass rate: trained against dropped",
        "Learning rate",
        "Staleness of trained tokens over time",
        "Duration of a step, and of the learner's phases in it".replace("'", "&#x27;"),
        "Where the learner's time went".replace("'", "&#x27;"),
        "Where the engines' time went".replace("'", "&#x27;"),
        "Tokens a second",
        "Log-probs of engine and learner under the same weights",
    } <= set(titles(page))
    assert "<!-- generator 0 -->" in page and "<!-- learner: train -->" in page
    assert all(f"<!-- {state} -->" in page for state in ("wait", "train", "sync", "idle", "busy"))
    assert "dir: &lt;here&gt;" in page


def test_memory_is_in_gib(page: str) -> None:
    assert "<th>peak_rss</th><td>controller: 1.50 GiB, engines: 2.00 GiB</td>" in page


def test_it_needs_no_other_file(page: str) -> None:
    assert "<script" not in page and "<link" not in page and 'src="' not in page


def test_text_of_the_run_is_escaped(page: str) -> None:
    assert "&lt;script&gt;alert(1)" in page
    assert "quatro_ray run: &lt;b&gt;run" in page


def test_the_last_rollouts_are_text_with_their_line_ends(page: str) -> None:
    assert re.findall(r"<h3>Step (\d+), group \d+, source sums</h3>", page) == ["3", "4", "5"]
    assert "<pre>What is 3 + 4?\nThink first.</pre>" in page
    assert page.count("<summary>Response 1: reward") == 3
    assert re.search(r"<summary>Response 2: reward [\d.]+ \(answer [01], form 1\), \d+ tokens, ", page)


def test_shares_are_on_a_linear_axis_from_0_to_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever the values are, and however many lines there are."""
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(plots, "_svg", lambda title, figure: drawn.setdefault(title, figure) and "<figure></figure>")
    write_report(write_run(tmp_path / "run"))
    for title in (
        "Queries by what bound their trust region",
        "Effective sample size of the batch, and tokens limited by clip, cut or mask",
        "Pass rate of trained groups by source",
        "Held-out questions",
    ):
        axes = drawn[title].axes[0]
        assert axes.get_yscale() == "linear"
        assert axes.get_ylim() == pytest.approx((-0.02, 1.02))
    assert drawn["Drift since sampling, per query"].axes[0].get_yscale() == "log"


def test_what_a_run_has_no_data_for_is_left_out(tmp_path: Path) -> None:
    """An objective without a trust region, a run without drops, a metric that is null or absent."""
    run = write_run(tmp_path / "run")
    before = titles(write_report(run).read_text())
    change_metrics(run, "trust_region/eta", "step/grad_norm", "rollout_corr/log_ratio_tokens")
    after = titles(write_report(run).read_text())
    assert set(before) - set(after) == {
        "η of informative queries", "Gradient norm", "Importance ratios of trained tokens",
    }  # fmt: skip
    assert "Dropped groups by reason" not in before


@pytest.mark.usefixtures("no_plots")
def test_a_crashed_run_has_a_report_with_its_last_notes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_steps=4, finished=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "reward/me')  # the writer died here
    page = write_report(run).read_text()
    assert "The run is not finished: step 4 of 8, last record 20" in page
    assert "ended by ClusterError: an engine was lost" in page
    assert "<th>learner_steps</th><td>4</td>" in page and "could not be read" not in page
    assert "<th>uninformative_steps</th><td>0</td>" in page


@pytest.mark.usefixtures("no_plots")
def test_lines_that_cannot_be_read_are_left_out_and_told(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_steps=3)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text(lines[0] + "\0" * 512 + "\n" + "3\n" + lines[2])
    page = write_report(run).read_text()
    assert "2 lines of metrics.jsonl could not be read and are left out." in page


@pytest.mark.usefixtures("no_plots")
def test_a_run_that_was_resumed_is_not_finished_by_its_earlier_end(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_steps=3)
    (run / "summary.json").write_text(json.dumps({"learner_steps": 2, "pass_at_1_end": 0.9}))
    page = write_report(run).read_text()
    assert "The run is not finished: step 3 of 6" in page and "pass_at_1_end" not in page


@pytest.mark.usefixtures("no_plots")
def test_a_summary_that_is_half_written_does_not_count(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "summary.json").write_text('{"learner_st')
    page = write_report(run).read_text()
    assert "not finished" in page and "1 lines of summary.json could not be read" in page


def test_a_run_before_its_first_step_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run: {num_steps: 9}\n")
    page = write_report(tmp_path).read_text()
    assert "step 0 of 9, last record never" in page and "<svg" not in page


def test_another_directory_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no run, as it has no config\.yaml; give the run\.dir of a run"):
        write_report(tmp_path)


@pytest.mark.usefixtures("no_plots")
def test_watching_follows_a_run_to_its_end(tmp_path: Path) -> None:
    """Nothing is written while nothing changes, and the last page does not load itself again."""
    run = write_run(tmp_path / "run", finished=False)
    pages = []

    def sleep(seconds: float) -> None:
        assert seconds == 7.0
        pages.append((run / "report.html").read_text())
        (run / "report.html").write_text("untouched")
        if len(pages) == 2:
            (run / "summary.json").write_text(json.dumps({"learner_steps": 2}))

    path = watch_report(run, 7.0, sleep)
    assert '<meta http-equiv="refresh" content="7">' in pages[0] and "not finished" in pages[0]
    assert pages[1] == "untouched"
    assert "The run is finished." in path.read_text() and "refresh" not in path.read_text()


def test_one_step_is_a_point_that_can_be_seen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(plots, "_svg", lambda title, figure: drawn.setdefault(title, figure) and "<figure></figure>")
    write_report(write_run(tmp_path / "run", num_steps=1, finished=False))
    for title in ("Reward of the trained batch", "Learning rate", "Response length"):
        for line in drawn[title].axes[0].get_lines():
            assert line.get_xdata() == [1] and line.get_marker() == "o"


def test_names_that_users_choose_are_drawn_as_they_are(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_steps=1)
    text = (run / "metrics.jsonl").read_text().replace(LONG_NAME, "_a$b$_{")
    (run / "metrics.jsonl").write_text(text)
    page = write_report(run).read_text()
    assert page.count("<!--  _a$b$_{ -->") == 2
