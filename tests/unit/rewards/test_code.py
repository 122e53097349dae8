"""Programs and their test cases, in the real sandbox."""

import json
from typing import Any

import pytest

from quatro_ray.config.rewards import CodeRewardConfig, SandboxLimits
from quatro_ray.errors import SandboxError
from quatro_ray.isolation import bubblewrap
from quatro_ray.rewards.code import CodeReward
from quatro_ray.rewards.program_cases import extract_program, parse_cases, same_output
from quatro_ray.types import Query, Response
from tests.make import needs_sandbox

pytestmark = pytest.mark.process

LIMITS = SandboxLimits(cpu_s=1, wall_s=30, memory_mib=128, max_processes=8, output_kib=64)
ADDS = [{"input": "1 2\n", "output": "3\n"}, {"input": "5 7", "output": "12"}]
SQUARES = [{"assert": "assert square(3) == 9"}, {"assert": "assert square(-2) == 4\nassert square(0) == 0"}]


def reward(program: str, cases: Any, *, all_tests: bool = True) -> float:
    reward = CodeReward(CodeRewardConfig(kind="code", limits=LIMITS, all_tests=all_tests))
    return reward(Query("q", "p", json.dumps(cases)), Response(program, 1, truncated=False))


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("print(1)", "print(1)"),
        ("So:\n```python\nprint(1)\n```\nDone.", "print(1)\n"),
        ("```python\na\n```\n```py\nb\n```\n```\nc\n```", "b\n"),
        ("```\na\n```\nor\n```\nb\n```", "b\n"),
        ("```bash\nls\n```\n", "ls\n"),
        ("```python\na\n```\nand then\n```python\nb", "a\n"),
        ("```\n```python\na\n```", "a\n"),
        ("  ```Python\r\n  a\r\n  ```", "  a\r\n"),
        ("```python\ns = '```'\n```", "s = '```'\n"),
        ("", ""),
    ],
)
def test_extraction(text: str, program: str) -> None:
    assert extract_program(text) == program


def test_same_output() -> None:
    assert same_output("1 \n2\t\n\n", "1\n2")
    assert same_output("1\r\n2", "1\n2\n")
    assert not same_output("1 2", "12")
    assert not same_output("\n1", "1")
    assert not same_output("", "1")


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("no", "must be JSON"),
        ("[" * 100_000, "must be JSON"),
        ("[]", "at least one"),
        ("3", "test case 0 must be"),
        ('[{"input": "1"}]', "test case 0 must be"),
        ('[{"input": "1", "output": 2}]', "output must be text"),
        ('[{"assert": "x ="}]', "must be Python"),
        ('{"inputs": ["1"], "outputs": []}', "same length"),
        ('{"inputs": ["1"]}', "same length"),
        ('{"inputs": ["1"], "outputs": ["1"], "fn_name": "f"}', "fn_name"),
    ],
)
def test_check_says_what_is_wrong(answer: str, says: str) -> None:
    reward = CodeReward(CodeRewardConfig(kind="code"))
    assert says in str(reward.check(Query("q", "p", answer)))
    with pytest.raises(ValueError, match=says):
        reward(Query("q", "p", answer), Response("print(1)", 1, truncated=False))


def test_forms_of_test_cases() -> None:
    assert parse_cases('{"inputs": ["1", ["2", "3"]], "outputs": ["1", ["4"]]}') == parse_cases(
        '[{"input": "1", "output": "1"}, {"input": "2\\n3", "output": "4"}]'
    )
    assert len(parse_cases('{"assert": "assert f()"}')) == 1
    assert CodeReward(CodeRewardConfig(kind="code")).check(Query("q", "p", json.dumps(ADDS + SQUARES))) is None


@needs_sandbox
@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("print(sum(map(int, input().split())))", 1),
        ("```python\nimport sys\nprint(sum(map(int, sys.stdin.read().split())), end='')\n```", 1),
        ("if __name__ == '__main__':\n    print(sum(map(int, input().split())))", 1),
        ("print(sum(map(int, input().split()))); raise SystemExit(0)", 1),
        ("print(3)", 0),
        ("print(sum(map(int, input().split())), 0)", 0),
        ("print(sum(map(int, input().split()))); 1 / 0", 0),
        ("print(sum(map(int, input().split()))); raise SystemExit(1)", 0),
        ("print(sum(map(int, input().split())), flush=True)\nwhile True: pass", 0),
        ("def f(:", 0),
        ("\0", 0),
        ("'\ud800'", 0),
        ("", 0),
    ],
)
def test_stdin_cases(program: str, expected: float) -> None:
    assert reward(program, ADDS) == expected


SQUARE = "def square(x): return x * x\n"


@needs_sandbox
@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (SQUARE, 1),
        (SQUARE + "print('noise'); import sys; print('noise', file=sys.stderr)", 1),
        (SQUARE + "if __name__ == '__main__': exit(1)", 1),
        (SQUARE + "import threading, time; threading.Thread(target=time.sleep, args=(99,)).start()", 1),
        (SQUARE + "import atexit, os; atexit.register(os._exit, 1)", 1),
        (
            "from __future__ import annotations\nfrom dataclasses import dataclass\n"
            "@dataclass\nclass Box:\n    x: int\ndef square(x): return Box(x * x).x",
            1,
        ),
        ("def square(x): return x + x", 0),
        ("", 0),
        ("import sys; sys.exit(0)", 0),
        ("import os; os._exit(0)", 0),
        ("def square(x): raise SystemExit(0)", 0),
        ("def square(x):\n  import os; os._exit(0)", 0),
        ("import atexit, os; atexit.register(os._exit, 0)\nexit()", 0),
        ("import os\nif os.fork() == 0: pass\nelse: os._exit(0)", 0),
        ("import os, sys; os.execv(sys.executable, [sys.executable, '-c', 'print(1)'])", 0),
        ("print('OK'); print('passed'); exit(0)", 0),
        ("import os\nfor f in range(64):\n  try: os.write(f, b'0' * 32)\n  except OSError: pass\nos._exit(0)", 0),
        ("import builtins; builtins.AssertionError = None; builtins.exec = lambda *a: None", 0),
        ("import builtins; builtins.compile = lambda *a: compile; builtins.int = lambda x: 0", 0),
        ("import os; os.read = lambda *a: b''; os.write = os.close = print", 0),
        ("import sys; sys.settrace(lambda *a: exit(0)); sys.excepthook = lambda *a: None", 0),
        ("import signal; signal.signal(2, lambda *a: exit(0)); signal.raise_signal(2)", 0),
        ("import os; os.kill(os.getpid(), 9)", 0),
        ("import os; os.closerange(0, 64)", 0),
        ("while True: pass", 0),
        ("raise BaseException", 0),
    ],
)
def test_assert_cases(program: str, expected: float) -> None:
    assert reward(program, SQUARES) == expected


@needs_sandbox
def test_the_token_is_not_the_programs_input() -> None:
    peeks = "import sys; text = sys.stdin.read(); print(text)\ndef square(x): return 9 if not text else 0"
    assert reward(peeks, SQUARES[:1]) == 1


@needs_sandbox
def test_partial_credit() -> None:
    assert reward("print(3)", ADDS, all_tests=False) == 0.5
    assert reward("def square(x): return 9", SQUARES, all_tests=False) == 0.5
    assert reward("print(sum(map(int, input().split())))", ADDS, all_tests=False) == 1
    assert reward("", ADDS, all_tests=False) == 0


@needs_sandbox
def test_stops_at_the_first_failure() -> None:
    cases = [{"input": "", "output": "1"}] * 200  # 200 runs would take tens of seconds
    assert reward("print(2)", cases) == 0


@needs_sandbox
def test_a_broken_sandbox_is_no_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bubblewrap, "_NOBODY", "no number")
    with pytest.raises(SandboxError):
        reward("print(3)", ADDS)
