"""A file of verdicts on queries, so that the next start need not check the same rows again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import quatro_ray
from quatro_ray.config import RewardConfig
from quatro_ray.types import Query

_JUDGES = ("math-verify", "latex2sympy2-extended", "reasoning-gym", "sympy")
"""Libraries whose versions decide what a check finds, besides the code of this package."""
_MAX_BYTES = 256 * 2**20


class Verdicts:
    """Why queries cannot be scored, or None for those that can, by the content of the query.

    The file belongs to one set of rewards and one version of the software; any other set has a file of its own. What
    cannot be read of it is checked again.

    Attributes:
        path: the file, below XDG_CACHE_HOME or ~/.cache.
        problem: why verdicts could not be written, or empty.
    """

    def __init__(self, rewards: Mapping[str, RewardConfig]) -> None:
        self.path = _folder() / f"{_digest(_configs(rewards), _software())}.jsonl"
        self.problem = ""
        self._known: dict[str, str | None] = {}
        try:
            lines = self.path.read_text("utf-8").splitlines() if self.path.stat().st_size < _MAX_BYTES else []
        except (OSError, UnicodeDecodeError):
            lines = []
        for line in lines:
            try:
                key, reason = json.loads(line)
            except ValueError:  # the empty first line, or a process ended while it wrote
                continue
            self._known[key] = reason

    def has(self, query: Query) -> bool:
        """Return whether the query was checked before."""
        return _key(query) in self._known

    def reason(self, query: Query) -> str | None:
        """Return why a query that was checked cannot be scored, or None if it can."""
        return self._known[_key(query)]

    def add(self, checked: Iterable[tuple[Query, str | None]]) -> None:
        """Keep verdicts, in the file too if it can be written; if not, `problem` says why."""
        new = {_key(query): reason for query, reason in checked}
        self._known |= new
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                # each line begins with its line end, because the last one may be half of one
                file.write("".join("\n" + json.dumps(item) for item in new.items()))
        except OSError as error:
            self.problem = f"{self.path}: cannot be written ({error.strerror})"


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quatro_ray" / "verdicts"


def _configs(rewards: Mapping[str, RewardConfig]) -> dict[str, Any]:
    return {name: reward.model_dump(mode="json") for name, reward in rewards.items()}


def _software() -> list[str]:
    package = Path(quatro_ray.__file__).parent
    files = sorted((package / "rewards").glob("*.py"))
    return [f"{name} {version(name)}" for name in _JUDGES] + [sha256(file.read_bytes()).hexdigest() for file in files]


def _key(query: Query) -> str:
    return _digest({name: value for name, value in asdict(query).items() if name != "query_id"})[:32]


def _digest(*values: Any) -> str:
    return sha256(json.dumps(values, sort_keys=True, default=str).encode("utf-8", "surrogatepass")).hexdigest()
