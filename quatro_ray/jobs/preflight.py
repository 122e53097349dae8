"""Checks everything that can be known before Ray starts, for `train`, `validate` and `eval`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from quatro_ray.config import Config, PretrainedModelConfig
from quatro_ray.data.dataset import Dataset
from quatro_ray.data.prompt_lengths import fit_prompts
from quatro_ray.data.registry import make_dataset
from quatro_ray.data.special_tokens import special_token_notes
from quatro_ray.data.template_kwargs import check_template_kwargs
from quatro_ray.engines.engine_args import check_engine_args
from quatro_ray.engines.forward_measurement import measure_forward
from quatro_ray.engines.objective_check import check_objective
from quatro_ray.engines.pretrained import (
    bos_token_of,
    check_division,
    check_folder,
    check_positions,
    tokenizer_of,
)
from quatro_ray.environments.registry import check_environments
from quatro_ray.errors import Problems
from quatro_ray.jobs.fingerprints import fingerprints
from quatro_ray.jobs.prepared import Prepared
from quatro_ray.jobs.run_directory import check_run_dir
from quatro_ray.orchestrator.device_memory import check_device_memory
from quatro_ray.orchestrator.host import check_host
from quatro_ray.orchestrator.resources import evaluation_bundles
from quatro_ray.telemetry.console import Progress
from quatro_ray.trackers.registry import check_trackers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check(config: Config) -> Prepared:
    """Check a training run: environments, rewards, data, tokenizer, model, objective, and what they ask of each other.

    Raises:
        SeveralErrors: several checks failed.
        QuatroError: one check failed.
    """
    problems = Problems()
    dataset, notes = _check_data(config, problems)
    _check_model(config, problems)
    with problems.collect():
        check_objective(config.objective)
    with problems.collect():
        check_trackers(config.telemetry)
    with problems.collect():
        check_host(config)
    with problems.collect():
        check_device_memory(config)
    inputs = None if dataset is None else fingerprints(config, dataset)
    with problems.collect():
        check_run_dir(config, inputs)
    problems.refuse()
    measure_forward(config)
    assert dataset is not None
    assert inputs is not None
    return Prepared(dataset, inputs, notes)


def check_evaluation(config: Config, model_path: str) -> Dataset:
    """Check an evaluation without a learner, and return all queries without those whose prompts are too long.

    Args:
        config: its model is that of the training run, and may not exist.
        model_path: folder or name of the model to evaluate.

    Raises:
        SeveralErrors: several checks failed.
        QuatroError: one check failed.
    """
    config = config.model_copy(update={"model": PretrainedModelConfig(kind="pretrained", path=model_path)})
    problems = Problems()
    dataset, _ = _check_data(config, problems)
    _check_model(config, problems)
    with problems.collect():
        check_host(config, evaluation_bundles(config))
    problems.refuse()
    assert dataset is not None
    return dataset


def _check_data(config: Config, problems: Problems) -> tuple[Dataset | None, tuple[str, ...]]:
    """Check environments, rewards, data and tokenizer; return the queries if they could be loaded, and notes."""
    dataset: Dataset | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    notes: tuple[str, ...] = ()
    with problems.collect():
        check_environments(config.environments)
    with problems.collect():
        dataset = make_dataset(config.data, config.rewards, Progress().say)
    with problems.collect():
        tokenizer = tokenizer_of(config)
    if tokenizer is not None:
        with problems.collect():
            check_template_kwargs(config.data, tokenizer)
    if dataset is not None and tokenizer is not None:
        with problems.collect():
            dataset = fit_prompts(dataset, tokenizer, config)
            notes = tuple(special_token_notes(dataset, tokenizer, bos_token_of(config)))
    return dataset, notes


def _check_model(config: Config, problems: Problems) -> None:
    for check_one in _CHECKS:
        with problems.collect():
            check_one(config)


_CHECKS: tuple[Callable[[Config], None], ...] = (
    check_folder,
    check_positions,
    check_division,
    check_engine_args,
)
"""Checks that need nothing but the configuration; each raises ConfigError."""
