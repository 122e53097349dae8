"""Imports go one way (docs/architecture.md)."""

import ast
from pathlib import Path

import quatro_ray

ROOT = Path(quatro_ray.__file__).parent
LAYERS = [
    {"types", "errors", "timeouts", "seeding", "chats", "files"},
    {"failures", "config", "telemetry", "algorithms"},
    {"replay", "weight_sync", "isolation"},
    {"rewards", "trackers"},
    {"data"},
    {"engines", "environments"},
    {"actors"},
    {"evaluation"},
    {"orchestrator"},
    {"jobs", "simulation"},
    {"cli"},
]
"""Lower first; a module may import its own layer's package and everything below."""
THIRD_PARTY = {
    "types": {"numpy"},
    "errors": set(),
    "config": {"pydantic", "yaml"},
    "failures": set(),
    "algorithms": {"torch"},
    "replay": {"numpy", "safetensors"},
}
HEAVY = {
    "peft",
    "torch",
    "ray",
    "vllm",
    "deepspeed",
    "transformers",
    "numpy",
    "pydantic",
    "yaml",
    "safetensors",
    "psutil",
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def modules() -> list[Path]:
    return [p for p in ROOT.rglob("*.py") if p.parent != ROOT or p.name != "__init__.py"]


def test_every_module_has_a_layer() -> None:
    assert {part_of(p) for p in modules()} == set().union(*LAYERS)


def test_imports_go_down() -> None:
    height = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    wrong = []
    for path in modules():
        own = part_of(path)
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "quatro_ray" and len(parts) > 1 and parts[1] in height:
                other = parts[1]
                if height[other] > height[own] or (height[other] == height[own] and other != own):
                    wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_low_layers_load_only_what_they_may() -> None:
    for path in modules():
        if part_of(path) in THIRD_PARTY:
            used = {name.split(".")[0] for name in imports(path)} & HEAVY
            assert used <= THIRD_PARTY[part_of(path)], path


def test_only_the_actors_and_what_is_above_know_ray() -> None:
    above = {"actors", "evaluation", "orchestrator", "jobs", "cli"}
    for path in modules():
        if part_of(path) not in above:
            assert "ray" not in {name.split(".")[0] for name in imports(path)}, path


def test_files_and_functions_stay_small() -> None:
    for path in modules():
        text = path.read_text()
        assert len(text.splitlines()) <= 450, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 80, f"{path}: {node.name}"
