"""Runs a response's Python program against test cases in the local sandbox."""

from __future__ import annotations

import sys

from quatro_ray.config.rewards import CodeRewardConfig
from quatro_ray.isolation.bubblewrap import FILES
from quatro_ray.isolation.run_program import run
from quatro_ray.rewards.program_cases import Case, check_cases, extract_program, parse_cases, same_output, share, trial
from quatro_ray.types import Query, Response


class CodeReward:
    """The share of the query's test cases that the program passes, or, with `all_tests`, 1 if it passes all of them.

    rewards/program_cases.py has the forms of test cases. A program that fails or exceeds a limit does not pass. Each
    test case takes at most wall_s. The reward starts sandboxes, so its own process must not run in one.
    """

    def __init__(self, config: CodeRewardConfig) -> None:
        self._limits = config.limits
        self._all_tests = config.all_tests

    def check(self, query: Query) -> str | None:
        """Return why the query's test cases cannot be used, or None if they can."""
        return check_cases(query)

    def __call__(self, query: Query, response: Response) -> float:
        """Return the reward, from 0 to 1.

        Raises:
            ValueError: the test cases cannot be used.
            SandboxError: the sandbox failed.
        """
        program = extract_program(response.text)
        cases = parse_cases(query.answer)
        return share((self._passes(program, case) for case in cases), len(cases), all_tests=self._all_tests)

    def _passes(self, program: str, case: Case) -> bool:
        tried = trial(program, case)
        command = [sys.executable, "-I", f"{FILES}/program.py"]
        ended = run(command, self._limits, stdin=tried.stdin, files={"program.py": tried.program})
        printed = ended.stdout.decode("utf-8", "replace")
        return ended.outcome == "ok" and ended.returncode == 0 and same_output(printed, tried.wanted)
