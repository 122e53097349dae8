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


@pytest.mark.parametrize("kind", ["pretrained", "tiny"])
def test_adapters_that_do_not_fit_are_refused(kind: str, tmp_path: Path) -> None:
    """Of a model that is measured, and of one that does not exist yet, whose shape alone is made."""
    make("Qwen2").save_pretrained(tmp_path)
    model = {"kind": kind} | ({"path": str(tmp_path)} if kind == "pretrained" else {})
    learner = {"num_ranks": 1, "learning_rate": 1e-3, "dtype": "float32", "tokens_per_micro_batch": 64}
    with pytest.raises(ConfigError, match=r"learner\.lora\.target_modules: gate fits no linear layer") as raised:
        measure_forward(config(model=model, learner=learner | {"lora": {"rank": 4, "target_modules": ["gate"]}}))
    assert "\n" not in str(raised.value)


def test_one_that_does_not_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.path=.*choose another") as raised:
        measure("Llama 4 (text)", tmp_path)
    assert "\n" not in str(raised.value)
