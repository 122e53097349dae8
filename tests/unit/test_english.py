"""Docstrings say what a thing is or does: none begins in the middle of a sentence."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import quatro_ray

PACKAGE = Path(quatro_ray.__file__).parent
RIDDLE = re.compile(
    r"\s*(Of|By|Where|Who|Whoever|What|With|For|To|From|As|Until|While|Because)\b|.*\b(whoever|goes on)\b",
    re.DOTALL | re.IGNORECASE,
)
"""A first word that has no subject, or words for which the field has better ones."""


def docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and text of the docstrings of modules, classes, functions and attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


def test_no_docstring_is_a_riddle() -> None:
    riddles = [
        f"{path.relative_to(PACKAGE)}:{line}: {text.splitlines()[0]}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for line, text in docstrings(ast.parse(path.read_text()))
        if RIDDLE.match(text)
    ]
    assert not riddles, "\n" + "\n".join(riddles)


@pytest.mark.parametrize(
    ("text", "is_riddle"),
    [
        ("Who waits for a learner hears here of its death.", True),
        ("By phase.", True),
        ("Files are added to: a run that goes on goes on in them.", True),
        ("Return what the learner needs for a step.", False),
        ("Forward the message.", False),
    ],
)
def test_a_riddle_is_found(text: str, is_riddle: bool) -> None:
    assert (RIDDLE.match(text) is not None) is is_riddle
