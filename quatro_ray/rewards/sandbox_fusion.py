"""Runs a response's Python program against test cases on SandboxFusion servers.

The interface is POST {url}/run_code of https://github.com/bytedance/SandboxFusion. The server is responsible for its
isolation and for the limits that this interface has no field for (processes, output).
"""

from __future__ import annotations

from typing import Any

from quatro_ray.config.rewards import SandboxFusionRewardConfig
from quatro_ray.failures import RewardUnavailable
from quatro_ray.rewards.http_client import JsonClient
from quatro_ray.rewards.program_cases import Case, extract_program, parse_cases, same_output, trial
from quatro_ray.types import Query, Response

_ENDED = {"Finished", "Error", "TimeLimitExceeded"}
"""Values of run_result.status that say that the program ran, and how it ended."""


class SandboxFusionReward:
    """The share of the query's test cases that the program passes, or, with `all_tests`, 1 if it passes all of them.

    rewards/program_cases.py has the forms of test cases.
    """

    def __init__(self, config: SandboxFusionRewardConfig, client: JsonClient | None = None) -> None:
        self._limits = config.limits
        self._all_tests = config.all_tests
        self._client = client or JsonClient(config)

    async def __call__(self, query: Query, response: Response) -> float:
        """Return the reward, from 0 to 1.

        Raises:
            ValueError: the test cases cannot be used.
            RewardUnavailable: the server did not run the program.
        """
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
        """Close the connections to the servers."""
        await self._client.close()

    async def _passes(self, program: str, case: Case) -> bool:
        tried = trial(program, case)
        body = {
            "code": tried.program.encode("utf-8", "replace").decode(),  # JSON cannot hold a lone surrogate
            "language": "python",
            "stdin": tried.stdin.decode("utf-8", "replace"),
            "run_timeout": self._limits.wall_s,
            "memory_limit_MB": self._limits.memory_mib,
        }
        result = _run_result(await self._client.post("/run_code", body))
        if result is None or result["status"] != "Finished" or result.get("return_code") != 0:
            return False
        return same_output(result.get("stdout") or "", tried.wanted)


def _run_result(answer: dict[str, object]) -> dict[str, Any] | None:
    """Return the result of the program's run, or None if the program did not compile.

    Raises:
        RewardUnavailable: the server reports a failure of its own, or its answer has an unknown form.
    """
    status, result = answer.get("status"), answer.get("run_result")
    if status == "Failed" and result is None and answer.get("compile_result"):
        return None
    if status not in ("Success", "Failed") or not isinstance(result, dict) or result.get("status") not in _ENDED:
        raise RewardUnavailable(f"SandboxFusion did not run the program: {str(answer)[:300]}")
    return result
