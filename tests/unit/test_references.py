"""What docs and docstrings point to is there: files, and names in files."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import quatro_ray

PACKAGE = Path(quatro_ray.__file__).parent
ROOT = PACKAGE.parent
REFERENCE = re.compile(r"(?<![\w/.<{])((?:[\w.-]+/)+[\w-]+\.(?:py|md|yaml|toml|sh))(?::([A-Za-z_]\w*(?:\.\w+)*))?")
"""A path with a folder, and after a colon the name of something in it."""
NOT_OURS = ("path/to/", "nowhere/", "vllm/", "my_", "your_")


def docstrings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.value.value


def texts() -> Iterator[tuple[Path, str]]:
    for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        yield path, path.read_text()
    for path in PACKAGE.rglob("*.py"):
        yield from ((path, text) for text in docstrings(path))


def names(path: Path) -> set[str]:
    """Everything that the module defines at its top level or in a class, the latter as Class.name too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if hasattr(inner, "name")}
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


def problem(name: str, inner: str | None) -> str | None:
    found = [p for p in (ROOT / name, PACKAGE / name, ROOT / "tests" / name, ROOT / "docs" / name) if p.is_file()]
    if not found:
        return f"{name} does not exist"
    if inner and name.endswith(".py") and inner not in names(found[0]):
        return f"{name} has no {inner}"
    return None


def test_paths_and_names_exist() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}: {what}"
        for path, text in texts()
        for name, inner in REFERENCE.findall(text)
        if not name.startswith(NOT_OURS) and (what := problem(name, inner or None))
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("see `replay/nothing.py`", "replay/nothing.py does not exist"),
        ("see `replay/ledger.py:Nothing`", "replay/ledger.py has no Nothing"),
        ("see `replay/ledger.py:Ledger.admit` and docs/results.md", None),
    ],
)
def test_a_wrong_reference_is_found(text: str, expected: str | None) -> None:
    problems = [problem(name, inner or None) for name, inner in REFERENCE.findall(text)]
    assert (problems[0] if expected else any(problems)) == (expected or False)
