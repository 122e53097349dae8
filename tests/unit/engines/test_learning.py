"""A learner rank that was not started says so; nothing here needs DeepSpeed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quatro_ray.config import GrpoConfig, LearnerConfig, QuatroConfig
from quatro_ray.engines.learner_spec import LearnerSpec
from quatro_ray.engines.learning import LearningEngine
from quatro_ray.replay.packing import pack
from quatro_ray.replay.staleness import Lineage
from quatro_ray.types import LearnerBatch, Rollout, Score, VersionSpan
from tests.make import group


def batch() -> LearnerBatch:
    tokens, logprobs = np.array([3], dtype=np.int32), np.zeros(1, np.float32)
    one = Rollout(tokens, logprobs, (VersionSpan(0, 0, 1),), "", "stop", Score(1.0))
    return pack([group(0, one, one)], Lineage.unbroken(0), num_ranks=1, rank=0, tokens_per_micro_batch=9)


CALLS: dict[str, Callable[[LearningEngine], Any]] = {
    "train_step": lambda engine: engine.train_step(batch(), 0),
    "logprobs": lambda engine: engine.logprobs(batch()),
    "weights": lambda engine: engine.weights,
    "save_checkpoint": lambda engine: engine.save_checkpoint(Path("path/to/nothing")),
    "load_checkpoint": lambda engine: engine.load_checkpoint(Path("path/to/nothing")),
    "export": lambda engine: engine.export(Path("path/to/nothing")),
}


@pytest.mark.parametrize("objective", [QuatroConfig(kind="quatro"), GrpoConfig(kind="grpo")])
@pytest.mark.parametrize("method", CALLS)
def test_methods_that_need_the_engine_ask_for_start(method: str, objective: QuatroConfig | GrpoConfig) -> None:
    spec = LearnerSpec(
        model_path="path/to/nothing",
        config=LearnerConfig(num_ranks=1, learning_rate=1e-3, dtype="float32", tokens_per_micro_batch=9),
        objective=objective,
        device="cpu",
        temperature=1.0,
        max_response_tokens=9,
        seed=0,
        num_steps=9,
    )
    engine = LearningEngine(spec, rank=0)
    with pytest.raises(RuntimeError, match=r"start\(\) must be called first"):
        CALLS[method](engine)
    assert engine.version == 0
    engine.shutdown()
