"""The settings of the overlap benchmark, and its sums; the runs themselves take minutes."""

from pathlib import Path

import pytest

from benchmarks.pipeline import CASES, _shares
from quatro_ray.config import load_config


@pytest.mark.parametrize("name", CASES)
def test_the_settings_of_every_case_exist(name: str) -> None:
    settings = CASES[name].settings
    found = load_config(Path("configs/demo.yaml"), [f"{setting}={value}" for setting, value in settings.items()])
    for setting, value in settings.items():
        section, field = setting.split(".")
        assert getattr(getattr(found, section), field) == value


def test_shares_of_time_are_weighted_by_the_length_of_the_steps() -> None:
    steps = [
        {"time/step_s": 1.0, "time_share/learner/train": 1.0},
        {"time/step_s": 3.0, "time_share/learner/train": 0.6, "time_share/learner/wait": 0.4},
    ]
    assert dict(_shares(steps)) == {"learner/train": 0.7, "learner/wait": 0.3}
