"""Log messages hold no secrets, and are printed once."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from quatro_ray.telemetry.console import Progress
from quatro_ray.telemetry.logs import log_to_stderr, without_secrets
from quatro_ray.telemetry.recorder import Recorder


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger("quatro_ray")
    before, level = list(logger.handlers), logger.level
    logger.handlers = []
    yield logger
    logger.handlers = before
    logger.setLevel(level)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Authorization: Bearer abc.DEF-1", "Authorization: Bearer ***"),
        ("POST https://me:pass@host:80/score failed", "POST https://***@host:80/score failed"),
        ("mail me@host about http://host/a@b", "mail me@host about http://host/a@b"),
        ("the token is s3cr3t-value", "the token is ***"),
        ("debug is true", "debug is true"),  # a variable's value this short is no secret
    ],
)
def test_secrets_are_masked(monkeypatch: pytest.MonkeyPatch, text: str, expected: str) -> None:
    monkeypatch.setenv("REWARD_TOKEN", "s3cr3t-value")
    monkeypatch.setenv("SKIP_KEY", "true")
    assert without_secrets(text) == expected


def test_messages_and_tracebacks_are_printed_once(
    logger: logging.Logger, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REWARD_TOKEN", "s3cr3t-value")
    log_to_stderr()
    log_to_stderr()
    inner = logging.getLogger("quatro_ray.rewards.http")
    inner.debug("not shown")
    try:
        raise ValueError("s3cr3t-value was refused")
    except ValueError:
        inner.exception("failed")
    shown = capsys.readouterr().err
    assert shown.count("ERROR quatro_ray.rewards.http: failed") == 1
    assert "ValueError: *** was refused" in shown
    assert "s3cr3t" not in shown and "not shown" not in shown


def test_other_libraries_are_left_alone(logger: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    log_to_stderr()
    logging.getLogger("httpx").info("GET https://host")
    assert capsys.readouterr().err == ""


def test_levels_of_events(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "quatro_ray")
    recorder = Recorder(tmp_path, num_steps=1, progress=Progress())
    for event in ("lost", "failed", "given_up", "damaged", "recovered", "fell_back", "written"):
        recorder.event(event, "learner")
    recorder.say("starting")
    recorder.close()
    levels = {record.getMessage(): record.levelname for record in caplog.records}
    assert {m for m, level in levels.items() if level == "WARNING"} == {
        "learner: lost",
        "learner: failed",
        "learner: given up",
        "learner: damaged",
    }
    assert levels["starting"] == levels["learner: recovered"] == levels["learner: written"] == "INFO"


@pytest.mark.process
def test_importing_the_actors_prints_no_messages() -> None:
    """Only an actor's own process does: Ray makes an instance of each class where it is declared, too."""
    program = "import logging, quatro_ray.actors.generator, ray; print(logging.getLogger('quatro_ray').handlers)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
    assert "Started a local Ray instance" not in done.stderr
