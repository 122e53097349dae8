"""Runs a response's Python program against test cases in the local sandbox."""

from __future__ import annotations

import sys

from quatro_ray.config.rewards import CodeRewardConfig
from quatro_ray.isolation.bubblewrap import FILES
from quatro_ray.isolation.run_program import run
from quatro_ray.rewards.program_cases import Case, check_cases, extract_program, parse_cases, same_output, share, trial
from quatro_ray.types import Query, Response


class CodeReward:
    """1 where the program passes the query's test cases; see cases.py for their forms.

    A program that fails, or meets a limit, is wrong. It takes up to wall_s for each test case. It starts sandboxes, so
    the process that calls it must not be in one itself.
    """

    def __init__(self, config: CodeRewardConfig) -> None:
        self._limits = config.limits
        self._all_tests = config.all_tests

    def check(self, query: Query) -> str | None:
        """Why the query's test cases cannot be used; None where they can."""
        return check_cases(query)

    def __call__(self, query: Query, response: Response) -> float:
        """Raises ValueError for test cases that cannot be used, SandboxError where the sandbox fails."""
        program = extract_program(response.text)
        cases = parse_cases(query.answer)
        return share((self._passes(program, case) for case in cases), len(cases), all_tests=self._all_tests)

    def _passes(self, program: str, case: Case) -> bool:
        tried = trial(program, case)
        command = [sys.executable, "-I", f"{FILES}/program.py"]
        ended = run(command, self._limits, stdin=tried.stdin, files={"program.py": tried.program})
        printed = ended.stdout.decode("utf-8", "replace")
        return ended.outcome == "ok" and ended.returncode == 0 and same_output(printed, tried.wanted)
