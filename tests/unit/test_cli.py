"""The command line: exit statuses, errors in one line, and the log messages of --verbose."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import quatro_ray.jobs.evaluate
import quatro_ray.jobs.train
from quatro_ray import cli
from quatro_ray.config import Config, dump_config
from quatro_ray.errors import Preempted, QuatroError, StallError
from quatro_ray.telemetry.console import Progress
from quatro_ray.telemetry.recorder import Recorder
from tests.make import config


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config(tmp_path / "run")))
    return path


@pytest.fixture(autouse=True)
def _logging() -> Iterator[None]:
    logger = logging.getLogger("quatro_ray")
    before, level = list(logger.handlers), logger.level
    logger.handlers = []
    yield
    logger.handlers = before
    logger.setLevel(level)


def main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["quatro-ray", *arguments])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert isinstance(exit_.value.code, int)
    return exit_.value.code


def fake_train(run_dir: Path, error: QuatroError | None = None) -> Any:
    """Stands for the job: a recorder that notes, loses an engine and then fails."""

    def train(loaded: Config, *, verbose: bool = False) -> Path:
        run_dir.mkdir(exist_ok=True)
        recorder = Recorder(run_dir, num_steps=1, progress=Progress(in_place=not verbose))
        recorder.note("group 7, again after https://user:hunter2@host/score failed")
        recorder.event("lost", "generator 0", why="killed")
        recorder.event("written", "checkpoint", step=3)
        recorder.close()
        if error:
            raise error
        return run_dir / "report.html"

    return train


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (StallError("evaluation of set missed evaluation.deadline_s=60 s"), 2, "error: evaluation of set missed"),
        (Preempted("received SIGTERM"), 143, "ended: received SIGTERM"),
    ],
)
def test_an_error_is_one_line_and_a_status(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    path: Path,
    error: QuatroError,
    status: int,
    line: str,
) -> None:
    monkeypatch.setattr(quatro_ray.jobs.train, "train", fake_train(tmp_path / "run", error))
    assert main(monkeypatch, "train", str(path)) == status
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 1 and shown[0].startswith(line)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["fields", "nonsense"], "error: nonsense: no such section; `quatro-ray fields` lists all"),
        (["report", "nowhere"], "error: nowhere: holds no run, as it has no config.yaml; give the run.dir of a run"),
        (["validate", "nowhere.yaml"], "error: nowhere.yaml: "),
        (["plan", "CONFIG", "run.nonsense=1"], "run.nonsense: unknown field"),
        (["eval", "CONFIG", "--model", "a", "--checkpoint", "b"], "error: --model and --checkpoint: give only one"),
    ],
)
def test_a_wrong_argument_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], path: Path, arguments: list[str], line: str
) -> None:
    assert main(monkeypatch, *(str(path) if a == "CONFIG" else a for a in arguments)) == 2
    shown = capsys.readouterr().err.splitlines()
    assert len(shown) == 1 and shown[0].startswith("error: ") and line in shown[0]


def test_fields_of_one_section() -> None:
    result = CliRunner().invoke(cli.app, ["fields", "checkpoint"])
    assert result.exit_code == 0
    assert "every_steps" in result.stdout and "max_staleness" not in result.stdout


@pytest.mark.parametrize("flag", ["--verbose", "-v"])
def test_verbose_logs_notes_and_events_on_stderr(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: Path, flag: str
) -> None:
    monkeypatch.setattr(quatro_ray.jobs.train, "train", fake_train(tmp_path / "run"))
    result = CliRunner().invoke(cli.app, ["train", flag, str(path)])
    assert result.exit_code == 0, result.output
    assert "INFO quatro_ray.telemetry.recorder: group 7, again after https://***@host/score failed" in result.stderr
    assert "WARNING quatro_ray.telemetry.recorder: generator 0: lost (why killed)" in result.stderr
    assert "INFO quatro_ray.telemetry.recorder: checkpoint: written (step 3)" in result.stderr


def test_without_it_the_console_has_what_the_progress_line_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: Path
) -> None:
    monkeypatch.setattr(quatro_ray.jobs.train, "train", fake_train(tmp_path / "run"))
    result = CliRunner().invoke(cli.app, ["train", str(path)])
    assert result.stderr == ""
    assert result.stdout.splitlines() == ["generator 0: lost (why killed)", f"report: {tmp_path / 'run/report.html'}"]
    notes = (tmp_path / "run" / "notes.log").read_text().splitlines()
    assert [line.split("  ", 1)[1] for line in notes] == [
        "group 7, again after https://***@host/score failed",
        "generator 0: lost (why killed)",
        "checkpoint: written (step 3)",
    ]


def test_verbose_reaches_the_evaluation_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, path: Path) -> None:
    given = []

    def evaluate_model(*arguments: Any, verbose: bool) -> list[Any]:
        given.append(verbose)
        return []

    monkeypatch.setattr(quatro_ray.jobs.evaluate, "evaluate_model", evaluate_model)
    for flags in ([], ["-v"]):
        assert CliRunner().invoke(cli.app, ["eval", *flags, str(path)]).exit_code == 0
    assert given == [False, True]
