"""Leaves out queries whose prompts are too long, once the tokenizer is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from quatro_ray.config import Config
from quatro_ray.data.chat_template import Encoder, encode_prompt
from quatro_ray.data.dataset import Dataset
from quatro_ray.errors import DataError
from quatro_ray.types import Query

_REASON = "its prompt is longer than generator.max_prompt_tokens"


def fit_prompts(dataset: Dataset, tokenizer: Encoder, config: Config) -> Dataset:
    """Return the dataset without queries whose prompt is empty or longer than generator.max_prompt_tokens.

    The queries that are left out are counted in `skipped`.

    Raises:
        DataError: a prompt does not fit and data.bad_rows=refuse; no query of a source is left; or the tokenizer's chat
            template cannot render a prompt.
    """
    max_tokens, refuse = config.generator.max_prompt_tokens, config.data.bad_rows == "refuse"
    skipped = {label: counts.copy() for label, counts in dataset.skipped.items()}

    def fitting(label: str, queries: Sequence[Query]) -> list[Query]:
        kept = []
        for query in queries:
            try:
                length = len(encode_prompt(tokenizer, query.prompt))
            except ValueError as error:
                raise DataError(
                    f"{query.query_id}: its chat cannot be rendered for the model ({str(error).splitlines()[0]}); use "
                    "a model whose chat template accepts it, or remove as_chat, system_prompt or the system messages"
                ) from error
            if 1 <= length <= max_tokens:
                kept.append(query)
            elif refuse:
                raise DataError(
                    f"{query.query_id}: its prompt has {length} tokens, generator.max_prompt_tokens={max_tokens} "
                    f"allows 1 to {max_tokens}; raise the limit, remove the row, or set data.bad_rows: skip"
                )
        if not kept:
            raise DataError(
                f"data.{label}: no query is left: all {len(queries)} have too long a prompt; raise the limit"
            )
        skipped[label][_REASON] += len(queries) - len(kept)
        return kept

    train = {name: fitting(f"train.{name}", queries) for name, queries in dataset.train.items()}
    held_out = {name: fitting(f"eval.{name}", queries) for name, queries in dataset.held_out.items()}
    return replace(dataset, train=train, held_out=held_out, skipped=skipped)
