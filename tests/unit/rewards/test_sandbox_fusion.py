"""The client of SandboxFusion, against a stand-in for its servers that runs the programs for real."""

import asyncio
import json
import subprocess
import sys
from typing import Any

import pytest

from quatro_ray.config.rewards import SandboxFusionRewardConfig, SandboxLimits
from quatro_ray.failures import RewardUnavailable
from quatro_ray.rewards.sandbox_fusion import SandboxFusionReward
from quatro_ray.types import Query, Response

pytestmark = pytest.mark.process

ADDS = [{"input": "1 2\n", "output": "3\n"}, {"input": "5 7", "output": "12"}]
SQUARES = [{"assert": "assert square(3) == 9"}, {"assert": "assert square(-2) == 4"}]


class Server:
    """Has the interface of JsonClient; answers as SandboxFusion's run_code does, or with what it was given."""

    def __init__(self, answer: dict[str, Any] | None = None) -> None:
        self.answer = answer
        self.bodies: list[dict[str, Any]] = []
        self.closed = False

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        assert path == "/run_code"
        json.dumps(body, ensure_ascii=False).encode()
        self.bodies.append(body)
        return self.answer or self.run(body)

    @staticmethod
    def run(body: dict[str, Any]) -> dict[str, Any]:
        command = [sys.executable, "-I", "-c", body["code"]]
        try:
            ended = subprocess.run(
                command, input=body["stdin"], capture_output=True, text=True, timeout=body["run_timeout"]
            )
        except subprocess.TimeoutExpired:
            return {"status": "Failed", "run_result": {"status": "TimeLimitExceeded", "stdout": "3\n"}}
        result = {"status": "Finished", "return_code": ended.returncode, "stdout": ended.stdout, "stderr": ended.stderr}
        return {"status": "Failed" if ended.returncode else "Success", "compile_result": None, "run_result": result}

    async def close(self) -> None:
        self.closed = True


def reward(server: Server, program: str, cases: Any, *, all_tests: bool = True) -> float:
    config = SandboxFusionRewardConfig(
        kind="sandbox_fusion",
        urls=("http://127.0.0.1:1",),
        limits=SandboxLimits(wall_s=2, memory_mib=128),
        all_tests=all_tests,
    )
    reward = SandboxFusionReward(config, server)  # type: ignore[arg-type]
    return asyncio.run(reward(Query("q", "p", json.dumps(cases)), Response(program, 1, truncated=False)))


@pytest.mark.parametrize(
    ("program", "cases", "expected"),
    [
        ("```python\nprint(sum(map(int, input().split())))\n```", ADDS, 1),
        ("print(3)", ADDS, 0),
        ("print(sum(map(int, input().split()))); exit(1)", ADDS, 0),
        ("print(3)\nwhile True: pass", ADDS[:1], 0),
        ("def square(x): return x * x", SQUARES, 1),
        ("def square(x): return 9", SQUARES, 0),
        ("import os; os._exit(0)", SQUARES, 0),
        ("'\ud800'", ADDS, 0),
    ],
)
def test_rewards(program: str, cases: Any, expected: float) -> None:
    assert reward(Server(), program, cases) == expected


def test_partial_credit_and_first_failure() -> None:
    server = Server()
    assert reward(server, "print(3)", ADDS, all_tests=False) == 0.5
    assert len(server.bodies) == 2
    server = Server()
    assert reward(server, "print(4)", ADDS) == 0
    assert len(server.bodies) == 1


def test_the_request_is_sandbox_fusions() -> None:
    server = Server()
    reward(server, "print(3)", ADDS[:1])
    assert server.bodies == [
        {"code": "print(3)", "language": "python", "stdin": "1 2\n", "run_timeout": 2.0, "memory_limit_MB": 128}
    ]


@pytest.mark.parametrize(
    "answer",
    [
        {"status": "SandboxError", "message": "no docker", "run_result": None},
        {"status": "Success", "run_result": None},
        {"status": "Success", "run_result": {"status": "Unheard"}},
        {"detail": "Not Found"},
    ],
)
def test_a_server_that_gave_no_reward(answer: dict[str, Any]) -> None:
    with pytest.raises(RewardUnavailable, match="did not run"):
        reward(Server(answer), "print(3)", ADDS)


def test_a_program_that_does_not_compile_is_wrong() -> None:
    answer = {"status": "Failed", "run_result": None, "compile_result": {"status": "Finished", "return_code": 1}}
    assert reward(Server(answer), "print(3)", ADDS) == 0
