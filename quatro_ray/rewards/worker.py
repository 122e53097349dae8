"""The program of a worker process: `python -m quatro_ray.rewards.worker`. Reads responses, writes parts of rewards.

The first frame says which rewards there are; each request names those to judge by (isolation/protocol.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from quatro_ray.isolation.protocol import Pipes, serve


def _make_judge(hello: dict[str, Any]) -> Callable[[Pipes, dict[str, Any]], dict[str, Any]]:
    from pydantic import TypeAdapter

    from quatro_ray.config import RewardConfig
    from quatro_ray.rewards.registry import make_reward
    from quatro_ray.types import Query, Response

    adapter: TypeAdapter[RewardConfig] = TypeAdapter(RewardConfig)
    rewards = {name: make_reward(adapter.validate_python(config)) for name, config in hello["parts"].items()}

    def judge(pipes: Pipes, request: dict[str, Any]) -> dict[str, Any]:
        query, response = Query(**request["query"]), Response(**request["response"])
        return {"parts": {name: rewards[name](query, response) for name in request["names"]}}

    return judge


if __name__ == "__main__":
    serve(_make_judge)
