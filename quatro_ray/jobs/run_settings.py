"""Reads from a run's config.yaml what is needed to look at the run, also if this version has other fields."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from quatro_ray.errors import ConfigError


@dataclass(frozen=True)
class RunSettings:
    """The settings of a run that its audit needs, as the last start of the run had them.

    Attributes:
        num_steps: optimiser steps of the whole run.
        groups_per_step: B.
        max_staleness: the cap on the age of trained tokens, in optimiser steps; None if older ones are trained too.
        rollouts_per_step: groups of each step in rollouts.jsonl.
        checkpoints: folder of the checkpoints.
        keep: number of checkpoints that are kept.
        kept_steps: steps whose rollouts are kept, and the checkpoints before them.
        evaluate_every: steps between evaluations; None if there are only those at the start and the end.
    """

    num_steps: int
    groups_per_step: int
    max_staleness: int | None
    rollouts_per_step: int
    checkpoints: Path
    keep: int
    kept_steps: frozenset[int]
    evaluate_every: int | None

    @property
    def evaluated_steps(self) -> frozenset[int]:
        """The steps at which a whole run evaluates."""
        every = self.evaluate_every or self.num_steps
        return frozenset({*range(0, self.num_steps, every), self.num_steps})


def read_tree(run_dir: Path) -> dict[str, Any]:
    """Return the content of config.yaml; empty if there is none.

    Raises:
        ConfigError: it is not a mapping in YAML.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        return {}
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{path}: is not YAML ({type(error).__name__}); restore it, or correct it") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must be a mapping of sections, not {type(tree).__name__}; correct it")
    return tree


def read_settings(run_dir: Path) -> RunSettings:
    """Read the settings of a run.

    Raises:
        ConfigError: config.yaml lacks one of them.
    """
    tree = read_tree(run_dir)

    def number(section: str, field: str) -> int:
        value = _section(tree, section).get(field)
        if not isinstance(value, int):
            raise ConfigError(
                f"{run_dir / 'config.yaml'}: {section}.{field} must be a whole number, not {value!r}; restore the file "
                "that the run wrote"
            )
        return value

    is_capped = _section(tree, "replay").get("on_stale") != "train"
    folder = _section(tree, "checkpoint").get("dir")
    if not (folder is None or isinstance(folder, str)):
        raise ConfigError(
            f"{run_dir / 'config.yaml'}: checkpoint.dir must be a path or null, not {folder!r}; restore the file that "
            "the run wrote"
        )
    kept = _section(tree, "replay").get("keep_steps")
    every = _section(tree, "evaluation").get("every_steps")
    return RunSettings(
        num_steps=number("run", "num_steps"),
        groups_per_step=number("replay", "groups_per_step"),
        max_staleness=number("replay", "max_staleness") if is_capped else None,
        rollouts_per_step=number("telemetry", "rollout_groups_per_step"),
        checkpoints=Path(folder) if folder else run_dir / "checkpoints",
        keep=number("checkpoint", "keep"),
        kept_steps=frozenset(s for s in kept if isinstance(s, int)) if isinstance(kept, list) else frozenset(),
        evaluate_every=every if isinstance(every, int) and every > 0 else None,
    )


def _section(tree: dict[str, Any], name: str) -> dict[str, Any]:
    section = tree.get(name)
    return section if isinstance(section, dict) else {}
