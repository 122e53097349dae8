"""Commands and options that the documentation shows exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer.main

from quatro_ray.cli import app

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
COMMANDS = typer.main.get_group(app).commands
SHOWN = re.compile(r"quatro-ray ([a-z]+)\b([^\n`#]*)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    text = page.read_text().replace("\\\n", " ")
    for name, rest in SHOWN.findall(text):
        assert name in COMMANDS, f"{page.name}: quatro-ray {name}"
        known = {option for parameter in COMMANDS[name].params for option in parameter.opts + parameter.secondary_opts}
        options = {option.rstrip(".,;)") for option in re.findall(r"(?<!\S)--[a-z-]+", rest)}
        assert options <= known | {"--help"}, f"{page.name}: quatro-ray {name} {rest}"


def test_the_page_of_operations_shows_them() -> None:
    shown = {name for name, _ in SHOWN.findall((ROOT / "docs/operations.md").read_text())}
    assert {"validate", "plan", "submit", "report", "eval", "replay"} <= shown


def test_what_it_shows_runs_on_the_cluster_that_it_starts() -> None:
    """Without an address, `train` and `eval` start a second cluster on the head."""
    text = (ROOT / "docs/operations.md").read_text()
    assert "ray start --head --dashboard-host 127.0.0.1" in text
    blocks = "\n".join(re.findall(r"```\n(.*?)```", text, re.DOTALL))
    for name, rest in SHOWN.findall(blocks):
        if name == "submit":
            assert "--address http://127.0.0.1:8265" in rest
        assert name not in ("train", "eval") or "cluster.address=auto" in rest
