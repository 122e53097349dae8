"""The texts that reasoning-gym's scorers may evaluate: Python literals, and arithmetic with the names of functions.

Some scorers pass the response to eval, or to sympy's parser, which calls eval: it could change the scorer, or answer in
its place. What these grammars let pass computes, and can do nothing else.
"""

from __future__ import annotations

import ast
import re
from importlib import import_module
from typing import Any

LITERAL_TASKS = frozenset({"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"})
"""Tasks whose scorers evaluate a list, or a list of lists (reasoning-gym 0.1.25)."""
EXPRESSION_TASKS = frozenset(
    {"countdown", "intermediate_integration", "polynomial_multiplication", "puzzle24", "simple_integration"}
)
"""Tasks whose scorers pass an expression to sympy's parser (reasoning-gym 0.1.25)."""

_FUNCTIONS = (
    "Abs|Integral|acos|acosh|asin|asinh|atan|atanh|cos|cosh|cot|coth|csc|erf|exp|ln|log|pi|sec|sign|sin|sinh|sqrt|tan|"
    "tanh"
)
_NUMBER = r"[0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?|\.[0-9]+"
_NAME = rf"(?:{_FUNCTIONS}|[A-Za-z])(?![A-Za-z0-9_])"
# atomic and possessive, so that a long text is never tried in several ways
_EXPRESSION = re.compile(rf"(?>\s|{_NUMBER}|{_NAME}|[-+*/^(),])*+", re.ASCII)


def is_expression(text: str) -> bool:
    """Return whether the text consists of numbers, operators, brackets, single letters and names of functions."""
    return _EXPRESSION.fullmatch(text) is not None


def evaluates_literals_only(dataset: Any) -> None:
    """Let the module of a dataset's class evaluate literals where it calls eval."""
    setattr(import_module(type(dataset).__module__), "eval", ast.literal_eval)  # noqa: B010
