"""Queries that reasoning-gym generates, without duplicates: small questions recur under many indices."""

from __future__ import annotations

import json
from typing import Any

from quatro_ray.chats import as_messages, chat_prompt
from quatro_ray.config import ChainSumSourceConfig, ReasoningGymSourceConfig
from quatro_ray.data.dataset import Rows
from quatro_ray.data.held_out import question_of
from quatro_ray.errors import ConfigError
from quatro_ray.rewards.reasoning_gym import METADATA_KEY
from quatro_ray.types import Query

_ITEMS_PER_QUESTION = 8
"""Items that are drawn from chain_sum, at most, for each distinct question that is wanted."""


def chain_sum(config: ChainSumSourceConfig, label: str) -> Rows:
    """Return `num_questions` distinct sums.

    Raises:
        ConfigError: the generator gave fewer distinct questions.
    """
    import reasoning_gym

    ranges = {n: getattr(config, n) for n in ("min_terms", "max_terms", "min_digits", "max_digits")}
    size = _ITEMS_PER_QUESTION * config.num_questions
    found: dict[str, str] = {}
    for item in reasoning_gym.create_dataset("chain_sum", size=size, seed=config.seed, **ranges):
        found.setdefault(render(item["metadata"]["expression"]), item["answer"])
        if len(found) == config.num_questions:
            return Rows([Query(f"{label}:{prompt}", prompt, answer) for prompt, answer in found.items()])
    raise ConfigError(
        f"data.{label}.num_questions={config.num_questions}: chain_sum with these terms and digits gave only "
        f"{len(found)} distinct questions in {size} draws; lower it, or allow more digits or terms"
    )


def render(expression: str) -> str:
    """Return the expression as a prompt: `12 + 34` becomes `12+34=`."""
    return expression.replace(" ", "") + "="


def reasoning_gym_task(config: ReasoningGymSourceConfig, label: str) -> Rows:
    """Return the distinct questions of a task.

    Raises:
        ConfigError: reasoning-gym has no such task, or refuses its parameters.
    """
    items = _create(config, label)
    rows, seen = Rows(), set()
    for index in range(config.size):
        item = items[index]
        if item["question"] in seen:
            rows.skipped["the question recurs"] += 1
            continue
        seen.add(item["question"])
        entry = {"task": config.task, "params": config.params, "seed": config.seed, "size": config.size, "index": index}
        prompt = config.prompt_template.replace("{prompt}", item["question"])
        if config.as_chat or config.system_prompt is not None:
            prompt = chat_prompt(as_messages(prompt, config.system_prompt))
        answer = str(item["answer"])
        rows.questions[f"{label}:{index}"] = question_of(item["question"])
        rows.queries.append(Query(f"{label}:{index}", prompt, answer, {METADATA_KEY: json.dumps(entry)}))
    return rows


def _create(config: ReasoningGymSourceConfig, label: str) -> Any:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if config.task not in DATASETS:
        raise ConfigError(f"data.{label}.task={config.task!r}: reasoning-gym has no such task; see `quatro-ray tasks`")
    try:
        return reasoning_gym.create_dataset(config.task, size=config.size, seed=config.seed, **config.params)
    except (TypeError, ValueError, AssertionError, AttributeError, KeyError) as error:
        raise ConfigError(f"data.{label}.params={config.params}: {config.task} refuses them ({error})") from error
