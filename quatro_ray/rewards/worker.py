"""The program of a worker process, `python -m quatro_ray.rewards.worker`: reads responses, writes values of rewards.

The first frame configures the rewards; each request names the rewards that score it (isolation/protocol.py).
"""

from __future__ import annotations

from typing import Any

from quatro_ray.isolation.protocol import Handler, Pipes, serve


def _make_handler(hello: dict[str, Any]) -> Handler:
    from pydantic import TypeAdapter

    from quatro_ray.config import RewardConfig
    from quatro_ray.rewards.registry import make_reward
    from quatro_ray.types import Query, Response

    adapter: TypeAdapter[RewardConfig] = TypeAdapter(RewardConfig)
    rewards = {name: make_reward(adapter.validate_python(config)) for name, config in hello["rewards"].items()}

    def score(pipes: Pipes, request: dict[str, Any]) -> dict[str, Any]:
        query, response = Query(**request["query"]), Response(**request["response"])
        return {"values": {name: rewards[name](query, response) for name in request["names"]}}

    return score


if __name__ == "__main__":
    serve(_make_handler)
