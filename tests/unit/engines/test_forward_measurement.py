"""`validate` and `train` refuse a model that the learner would compute wrongly, before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.models import make
from quatro_ray.engines.forward_measurement import measure_forward
from quatro_ray.errors import ConfigError
from tests.make import config

pytestmark = pytest.mark.process


def measure(name: str, path: Path) -> None:
    make(name).save_pretrained(path)
    measure_forward(config(model={"kind": "pretrained", "path": str(path)}))


@pytest.mark.parametrize("name", ["Qwen2", "LFM2"])
def test_a_model_that_trains_passes(name: str, tmp_path: Path) -> None:
    measure(name, tmp_path)


def test_one_that_does_not_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.path=.*choose another") as raised:
        measure("Llama 4 (text)", tmp_path)
    assert "\n" not in str(raised.value)
