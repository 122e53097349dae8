"""The program of a worker process, `python -m quatro_ray.rewards.worker`: reads responses, writes values of rewards.

The first frame configures the rewards; each request names the rewards that score it (isolation/protocol.py). A request
with the key `check` has queries, and is answered with the reasons for which they cannot be scored.
"""

from __future__ import annotations

import io
import resource
from contextlib import redirect_stdout
from typing import Any

from quatro_ray.isolation.protocol import Handler, Pipes, serve

MAX_PRINTED_CHARS = 1000
"""Characters of what rewards print for one response that are kept."""


def _make_handler(hello: dict[str, Any]) -> Handler:
    from pydantic import TypeAdapter

    from quatro_ray.config import RewardConfig
    from quatro_ray.isolation.user_function import UserFunctionError
    from quatro_ray.rewards.base import AnswerUnreadable
    from quatro_ray.rewards.query_checks import checks_of, first_reason
    from quatro_ray.rewards.reasoning_gym import in_sandbox
    from quatro_ray.rewards.registry import make_reward
    from quatro_ray.types import Query, Response

    adapter: TypeAdapter[RewardConfig] = TypeAdapter(RewardConfig)
    configs = {name: adapter.validate_python(config) for name, config in hello["rewards"].items()}
    rewards = {name: make_reward(config) for name, config in configs.items()}
    checks = checks_of(rewards)
    if in_sandbox():  # a response is executed in this process, and a copy of the process would answer on the same pipe
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))

    def score(request: dict[str, Any]) -> dict[str, Any]:
        query, response = Query(**request["query"]), Response(**request["response"])
        values, unreadable, printed = {}, [], io.StringIO()
        with redirect_stdout(printed):
            for name in request["names"]:
                try:
                    values[name] = rewards[name](query, response)
                except AnswerUnreadable as error:
                    values[name] = 0.0
                    unreadable.append(f"rewards.{name}: {error}")
                except UserFunctionError as error:
                    return {"error": f"rewards.{name}: {error}"}
        no_verdict = [name for name, value in values.items() if value is None]
        return {
            "values": values,
            "unreadable": "; ".join(unreadable),
            "no_verdict": no_verdict,
            "printed": printed.getvalue()[:MAX_PRINTED_CHARS],
        }

    def answer(pipes: Pipes, request: dict[str, Any]) -> dict[str, Any]:
        if "check" in request:
            return {"reasons": [first_reason(Query(**query), checks, configs) for query in request["check"]]}
        return score(request)

    return answer


if __name__ == "__main__":
    serve(_make_handler)
