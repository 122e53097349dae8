"""reasoning-gym's own scorers. The entry is made again from task, parameters, seed and index: it is not JSON."""

from __future__ import annotations

import json
import os
from functools import lru_cache
from importlib import import_module
from typing import Any

from quatro_ray.config import ReasoningGymRewardConfig
from quatro_ray.rewards.extract import extract
from quatro_ray.types import Query, Response

METADATA_KEY = "reasoning_gym"
"""In Query.metadata: JSON of task, params, seed, size, index."""
SANDBOX_VARIABLE = "QUATRO_RAY_SANDBOX"
"""Set by whoever starts a worker inside the sandbox (rewards/workers.py)."""
EXECUTING_TASKS = frozenset(
    {
        "binary_matrix",
        "countdown",
        "intermediate_integration",
        "n_queens",
        "polynomial_multiplication",
        "puzzle24",
        "simple_integration",
        "spiral_matrix",
        "string_insertion",
    }
)
"""Their scorers hand the response to eval or to sympy's parser, which evaluates it. reasoning-gym 0.1.25."""


class ReasoningGymReward:
    def __init__(self, config: ReasoningGymRewardConfig) -> None:
        self._config = config
        import_module("reasoning_gym")  # now: it takes a second, which is not the first response's to pay

    def check(self, query: Query) -> str | None:
        return None if METADATA_KEY in query.metadata else "needs a query that a reasoning_gym source made"

    def __call__(self, query: Query, response: Response) -> float:
        answer = extract(response.text, self._config.extract)
        if answer is None:
            return 0.0
        where = json.loads(query.metadata[METADATA_KEY])
        if where["task"] in EXECUTING_TASKS and not in_sandbox():
            raise RuntimeError(f"the scorer of {where['task']} executes responses, and this process is not sandboxed")
        dataset = _dataset(where["task"], json.dumps(where["params"], sort_keys=True), where["seed"], where["size"])
        score = float(dataset.score_answer(answer, dataset[where["index"]]))
        threshold = self._config.threshold
        return score if threshold is None else float(score >= threshold)


def in_sandbox() -> bool:
    return os.environ.get(SANDBOX_VARIABLE) == "1"


@lru_cache(maxsize=32)
def _dataset(task: str, params: str, seed: int, size: int) -> Any:
    import reasoning_gym

    return reasoning_gym.create_dataset(task, seed=seed, size=size, **json.loads(params))
