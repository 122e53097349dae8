"""Trackers and callbacks that cannot be used are refused before anything starts; what a callback may be."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from quatro_ray.config import TelemetryConfig
from quatro_ray.errors import ConfigError
from quatro_ray.telemetry.evaluation_result import EvaluationResult
from quatro_ray.trackers.registry import check_trackers
from tests.unit.trackers.followed import callback, config, events, followed, step

DOCS = Path(__file__).parents[3] / "docs" / "trackers.md"


def refused(tmp_path: Path, code: str, name: str = "Mine") -> str:
    path = callback(tmp_path, "    pass").replace(":Mine", f":{name}")
    with (tmp_path / "callbacks.py").open("a") as file:
        file.write(f"\n{code}\n")
    with pytest.raises(ConfigError) as caught:
        check_trackers(TelemetryConfig(callbacks=(path,)))
    return str(caught.value)


@pytest.mark.parametrize(
    ("code", "name", "message"),
    [
        ("", "Other", "has no function 'Other'; correct the name"),
        ("import nowhere", "Mine", "importing it failed: ModuleNotFoundError: No module named 'nowhere'"),
        ("class Other:\n    def on_steps(self, step, metrics): pass", "Other", "has the methods ['on_steps'], but a"),
        ("class Other: pass", "Other", "has the methods none, but a callback has one or more of on_start, on_step, on"),
        (
            "class Other:\n    def on_step(self, step): pass",
            "Other",
            "on_step': cannot be called with (self, step, me",
        ),
        (
            "class Other:\n    def __init__(self, x): pass\n    def on_step(self, step, metrics): pass",
            "Other",
            ":Other': cannot be called with (): missing a required argument: 'x'",
        ),
        ("def other(step): pass", "other", "other': cannot be called with (step, metrics): too many positional"),
    ],
)
def test_a_callback_that_cannot_be_called_is_refused(tmp_path: Path, code: str, name: str, message: str) -> None:
    text = refused(tmp_path, code, name)
    assert text.startswith("telemetry.callbacks=") and message in text


def test_one_with_static_methods_and_one_of_a_library_are_accepted(tmp_path: Path) -> None:
    path = callback(tmp_path, "    @staticmethod\n    def on_step(step, metrics): pass\n")
    check_trackers(TelemetryConfig(callbacks=(path, "logging:log")))


def test_a_client_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "swanlab", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "quatro_ray.trackers.swanlab", raising=False)
    with pytest.raises(ConfigError) as caught:
        check_trackers(TelemetryConfig(trackers=("tensorboard", "swanlab")))
    assert "the client of swanlab cannot be imported (" in str(caught.value)
    assert "install it with `pip install swanlab` (docs/trackers.md), or remove it from the list" in str(caught.value)


@pytest.mark.process
def test_a_function_is_called_with_each_step(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(f"def mine(step, metrics): print(step, metrics['reward/mean'], file=open('{tmp_path}/out', 'a'))")
    made = config(tmp_path / "run", callbacks=[f"{file}:mine"])
    with followed(made) as recorder:
        step(recorder, 1)
        step(recorder, 2)
    assert (tmp_path / "out").read_text() == "1 0.5\n2 0.5\n"
    assert events(made.run.dir) == []


@pytest.mark.process
def test_the_example_in_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"```python\n# my_callbacks.py\n(.*?)```", DOCS.read_text(), re.DOTALL)
    (tmp_path / "my_callbacks.py").write_text(example)
    monkeypatch.chdir(tmp_path)
    made = config(tmp_path / "run", callbacks=["my_callbacks:Best"])
    with followed(made) as recorder:
        for number, rate in ((0, 0.25), (1, 0.5), (2, 0.375)):
            recorder.evaluation(EvaluationResult("sums", number, number, 4, 8, {1: rate}, 0.5, {}, 3, 0.4, 0.0, 64))
            step(recorder, number)
    assert (made.run.dir / "best.txt").read_text() == "step 1: 0.5\n"
    assert events(made.run.dir) == []
