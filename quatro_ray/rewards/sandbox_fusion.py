"""Runs a response's Python program against test cases on SandboxFusion servers.

https://github.com/bytedance/SandboxFusion: POST {url}/run_code. What the server's sandbox keeps out is the server's
affair, and so are the limits that its interface has no field for (processes, output).
"""

from __future__ import annotations

from typing import Any

from quatro_ray.config.rewards import SandboxFusionRewardConfig
from quatro_ray.failures import RewardUnavailable
from quatro_ray.rewards.http_client import JsonClient
from quatro_ray.rewards.program_cases import Case, extract_program, parse_cases, same_output, trial
from quatro_ray.types import Query, Response

_ENDED = {"Finished", "Error", "TimeLimitExceeded"}
"""Of run_result.status: the program ran, and this is how it ended."""


class SandboxFusionReward:
    """1 where the program passes the query's test cases; see cases.py for their forms."""

    def __init__(self, config: SandboxFusionRewardConfig, client: JsonClient | None = None) -> None:
        self._limits = config.limits
        self._all_tests = config.all_tests
        self._client = client or JsonClient(config)

    async def __call__(self, query: Query, response: Response) -> float:
        """Raises ValueError for test cases that cannot be used, RewardUnavailable where the server did not judge."""
        program = extract_program(response.text)
        cases = parse_cases(query.answer)
        num_passed = 0
        for case in cases:
            if await self._passes(program, case):
                num_passed += 1
            elif self._all_tests:
                return 0.0
        return num_passed / len(cases)

    async def close(self) -> None:
        await self._client.close()

    async def _passes(self, program: str, case: Case) -> bool:
        tried = trial(program, case)
        body = {
            "code": tried.program.encode("utf-8", "replace").decode(),  # JSON holds no half characters
            "language": "python",
            "stdin": tried.stdin.decode("utf-8", "replace"),
            "run_timeout": self._limits.wall_s,
            "memory_limit_MB": self._limits.memory_mib,
        }
        result = _run_result(await self._client.post("/run_code", body))
        if result is None or result["status"] != "Finished" or result.get("return_code") != 0:
            return False
        return same_output(result.get("stdout") or "", tried.wanted)


def _run_result(answer: dict[str, Any]) -> dict[str, Any] | None:
    """How the program's run went; None where the server could not even compile it.

    Raises:
        RewardUnavailable: the server speaks of its own failure, or not in the form that we know.
    """
    status, result = answer.get("status"), answer.get("run_result")
    if status == "Failed" and result is None and answer.get("compile_result"):
        return None
    if status not in ("Success", "Failed") or not isinstance(result, dict) or result.get("status") not in _ENDED:
        raise RewardUnavailable(f"SandboxFusion did not run the program: {str(answer)[:300]}")
    return result
