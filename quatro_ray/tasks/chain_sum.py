"""reasoning-gym's chain_sum with terse prompts, for models too small to read English."""

from __future__ import annotations

import random

from quatro_ray.config import ChainSumTaskConfig
from quatro_ray.errors import ConfigError
from quatro_ray.types import Query

_ITEMS_PER_QUESTION = 8
"""Items drawn from the generator for each distinct question wanted, before giving up."""


class ChainSumDataset:
    """Distinct questions only: an index says nothing, since small sums recur under many indices."""

    def __init__(self, config: ChainSumTaskConfig, seed: int) -> None:
        questions = _distinct_questions(config, seed)
        random.Random(seed).shuffle(questions)
        queries = [Query(query_id=prompt, prompt=prompt, answer=answer) for prompt, answer in questions]
        self.held_out = queries[: config.num_held_out]
        self.train = queries[config.num_held_out :]


def _distinct_questions(config: ChainSumTaskConfig, seed: int) -> list[tuple[str, str]]:
    import reasoning_gym

    items = reasoning_gym.create_dataset(
        "chain_sum",
        size=_ITEMS_PER_QUESTION * config.num_questions,
        seed=seed,
        min_terms=config.min_terms,
        max_terms=config.max_terms,
        min_digits=config.min_digits,
        max_digits=config.max_digits,
    )
    found: dict[str, str] = {}
    for item in items:
        found.setdefault(render(item["metadata"]["expression"]), item["answer"])
        if len(found) == config.num_questions:
            return list(found.items())
    raise ConfigError(
        f"task.num_questions={config.num_questions}: chain_sum with these terms and digits gave only {len(found)} "
        f"distinct questions in {len(items)} draws; lower it, or allow more digits or terms"
    )


def render(expression: str) -> str:
    """`12 + 34` → `12+34=`."""
    return expression.replace(" ", "") + "="
