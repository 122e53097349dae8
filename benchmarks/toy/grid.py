"""Which runs the study is made of. One `Spec` a run; its key names it in the file of results."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

from pydantic import TypeAdapter

from quatro_ray.config import LearnerConfig, ObjectiveConfig, StepControlConfig

TASKS = ("addition", "palindrome")
SEEDS = (0, 1, 2)
STALENESS = (0, 8, 64, 256)
LEARNING_RATE = 4e-4
"""Tuned for GRPO on fresh samples, without control: 2e-4, 4e-4 and 8e-4 were tried."""
MULTIPLES = (1, 3, 10)
NUM_STEPS = 400

METHODS: dict[str, dict[str, Any]] = {
    "quatro": {"kind": "quatro"},
    "grpo": {"kind": "grpo"},
    # the paper's range is for responses of thousands of tokens; these have seven, and so a wider spread
    "gspo": {"kind": "gspo", "clip_low": 0.1, "clip_high": 0.15},
    "decoupled_ppo": {"kind": "decoupled_ppo"},
    "m2po": {"kind": "m2po"},
    "dr_grpo": {"kind": "dr_grpo"},
    "dapo": {"kind": "dapo"},
    "cispo": {"kind": "cispo"},
    "tis_grpo": {"kind": "tis_grpo"},
    "mis_grpo": {"kind": "mis_grpo"},
    "sapo": {"kind": "sapo"},
    "reinforce": {"kind": "reinforce"},
    # the ablation: the same budget for every sample, at the level that the default has at one staleness
    "quatro_fixed_64": {"kind": "quatro", "staleness_exponent": 0.0, "kl_budget_nats": 0.016 * 65},
    "quatro_fixed_0": {"kind": "quatro", "staleness_exponent": 0.0},
}
WHOLE_GRID = ("quatro", "grpo", "gspo", "decoupled_ppo", "m2po")
CORNERS = ("dr_grpo", "dapo", "cispo", "tis_grpo", "mis_grpo", "sapo", "reinforce")
ABLATION = ("quatro_fixed_64", "quatro_fixed_0")


@dataclass(frozen=True)
class Spec:
    task: str
    method: str
    staleness: int
    multiple: int
    control: bool
    seed: int

    @property
    def key(self) -> str:
        return "/".join(str(v) for v in asdict(self).values())

    def objective(self) -> ObjectiveConfig:
        return TypeAdapter(ObjectiveConfig).validate_python(METHODS[self.method])

    def learner(self) -> LearnerConfig:
        control = StepControlConfig() if self.control else StepControlConfig(window_kl_nats=None)
        return LearnerConfig(
            num_ranks=1,
            learning_rate=LEARNING_RATE * self.multiple,
            tokens_per_micro_batch=1,
            step_control=control,
        )


def all_specs() -> list[Spec]:
    """Seed by seed; within a seed the grid, then the ablation, then the other baselines."""
    return [spec for seed in SEEDS for spec in _of_seed(seed)]


def _of_seed(seed: int) -> Iterator[Spec]:
    for control, multiple, staleness, task, method in product((True, False), MULTIPLES, STALENESS, TASKS, WHOLE_GRID):
        yield Spec(task, method, staleness, multiple, control, seed)
    for staleness, task, method in product(STALENESS, TASKS, ABLATION):
        yield Spec(task, method, staleness, 1, True, seed)
    for control, multiple, staleness, task, method in product(
        (True, False), (MULTIPLES[0], MULTIPLES[-1]), (STALENESS[0], STALENESS[-1]), TASKS, CORNERS
    ):
        yield Spec(task, method, staleness, multiple, control, seed)
