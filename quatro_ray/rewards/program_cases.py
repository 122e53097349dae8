"""Programs and their test cases: extracts programs from responses, parses test cases and compares outputs.

Both ways to run programs use it: rewards/code.py in the local sandbox and rewards/sandbox_fusion.py on a server.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from quatro_ray.types import Query

_FENCE = re.compile(r"[ \t]*```[ \t]*([\w+.-]*)[ \t]*$")
_PYTHON = {"python", "py", "python3"}
DRIVER = Path(__file__).with_name("assert_driver.py").read_text(encoding="utf-8")


@dataclass(frozen=True)
class StdinCase:
    """The program reads `input` on standard input and must print `output`."""

    input: str
    output: str


@dataclass(frozen=True)
class AssertCase:
    """`code` runs after the program, with the program's names, and must not raise."""

    code: str


Case = StdinCase | AssertCase


def extract_program(text: str) -> str:
    """Return the last closed ```python block, else the last closed block, else the whole text."""
    blocks: list[tuple[str, str]] = []
    language: str | None = None  # language of the open block
    lines: list[str] = []
    for line in text.splitlines(keepends=True):
        fence = _FENCE.match(line.rstrip("\r\n"))
        if fence and language is not None and not fence[1]:
            blocks.append((language, "".join(lines)))
            language = None
        elif fence:  # a fence with a language opens a block, inside of another one too
            language, lines = fence[1].lower(), []
        elif language is not None:
            lines.append(line)
    python = [code for name, code in blocks if name in _PYTHON]
    return (python or [code for _, code in blocks] or [text])[-1]


def parse_cases(answer: str) -> list[Case]:
    """Parse test cases from JSON.

    Args:
        answer: a list of {"input": text, "output": text} and {"assert": code}, or one of these alone; or the form of
            APPS and verl, {"inputs": [...], "outputs": [...]}, whose entries are texts or lists of lines.

    Raises:
        ValueError: the test cases cannot be used; the message says why.
    """
    try:
        data = json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the test cases must be JSON ({error}); correct the answer") from error
    if isinstance(data, dict) and "inputs" in data:
        return _columns(data)
    rows = data if isinstance(data, list) else [data]
    if not rows:
        raise ValueError("there must be at least one test case; drop the query or add one")
    return [_case(row, f"test case {i}") for i, row in enumerate(rows)]


def check_cases(query: Query) -> str | None:
    """Return why the query's test cases cannot be used, or None if they can."""
    try:
        parse_cases(query.answer)
    except ValueError as error:
        return str(error)
    return None


def _columns(data: dict[str, object]) -> list[Case]:
    if data.get("fn_name"):
        raise ValueError(f"fn_name={data['fn_name']!r} is not supported: write its calls as {{'assert': code}}")
    inputs, outputs = data["inputs"], data.get("outputs")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or not inputs or len(inputs) != len(outputs):
        raise ValueError("inputs and outputs must be lists of the same length, at least 1; correct them")
    return [
        StdinCase(_text(given, f"inputs[{i}]"), _text(wanted, f"outputs[{i}]"))
        for i, (given, wanted) in enumerate(zip(inputs, outputs, strict=True))
    ]


def _case(row: object, place: str) -> Case:
    if isinstance(row, dict) and set(row) == {"input", "output"}:
        return StdinCase(_text(row["input"], f"{place}: input"), _text(row["output"], f"{place}: output"))
    if isinstance(row, dict) and set(row) == {"assert"} and isinstance(row["assert"], str):
        try:
            compile(row["assert"], place, "exec")
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"{place}: assert must be Python ({error}); correct it") from error
        return AssertCase(row["assert"])
    raise ValueError(f"{place} must be {{'input': text, 'output': text}} or {{'assert': code}}, not {str(row)[:80]}")


def _text(value: object, place: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    raise ValueError(f"{place} must be text or a list of lines, not {str(value)[:80]}")


def same_output(printed: str, wanted: str) -> bool:
    """Return whether the outputs are equal, aside from white space at line ends and empty lines at the end."""
    return _lines(printed) == _lines(wanted)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


@dataclass(frozen=True)
class Trial:
    """The run that decides one test case: `program` is run with `stdin` and must print `wanted`."""

    program: str
    stdin: bytes
    wanted: str


def trial(program: str, case: Case) -> Trial:
    """Return the run that decides the case.

    For an AssertCase, rewards/assert_driver.py runs in place of the program; its docstring says what it guarantees.
    """
    if isinstance(case, StdinCase):
        return Trial(program, _bytes(case.input), case.output)
    token = secrets.token_hex(16)
    parts = [_bytes(part) for part in (program, case.code, token)]
    return Trial(DRIVER, b"".join(b"%010d" % len(part) + part for part in parts), token)


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def share(passed: Iterable[bool], num_cases: int, *, all_tests: bool) -> float:
    """Return the share of cases that passed, or, with `all_tests`, 1 if all passed and else 0.

    With `all_tests`, no case is tried after the first failure.
    """
    if all_tests:
        return float(all(passed))
    return sum(passed) / num_cases
