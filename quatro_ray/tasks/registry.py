"""From names in the configuration to datasets and verifiers."""

from __future__ import annotations

from quatro_ray.config import ChainSumTaskConfig, EvaluationConfig, TaskConfig
from quatro_ray.errors import ConfigError
from quatro_ray.tasks import verifiers
from quatro_ray.tasks.base import Dataset, Verifier

VERIFIERS: dict[str, Verifier] = {"integer": verifiers.integer, "exact": verifiers.exact}


def make_dataset(config: TaskConfig, seed: int) -> Dataset:
    """Raises DataError where a file of the user's is at fault."""
    if isinstance(config, ChainSumTaskConfig):
        from quatro_ray.tasks.chain_sum import ChainSumDataset

        return ChainSumDataset(config, seed)
    from quatro_ray.tasks.json_lines import JsonLinesDataset

    return JsonLinesDataset(config)


def check_held_out(config: EvaluationConfig, dataset: Dataset) -> None:
    """Raises ConfigError where evaluation asks for more questions than there are."""
    if config.num_queries > len(dataset.held_out):
        raise ConfigError(
            f"evaluation.num_queries={config.num_queries}: there are only {len(dataset.held_out)} "
            "held-out questions; lower it or provide more"
        )


def make_verifier(name: str) -> Verifier:
    if name not in VERIFIERS:
        raise ConfigError(f"task.verifier={name!r}: must be one of {sorted(VERIFIERS)}")
    return VERIFIERS[name]
