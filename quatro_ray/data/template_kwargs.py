"""Variables for the chat template, such as enable_thinking: put into the prompts of a source, and checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from quatro_ray.chats import chat_prompt, is_chat, messages_of
from quatro_ray.config import ChainSumSourceConfig, DataConfig, TrainShareSourceConfig
from quatro_ray.data.dataset import Rows
from quatro_ray.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIELD = "chat_template_kwargs"


def add_template_kwargs(rows: Rows, kwargs: Mapping[str, Any], label: str) -> None:
    """Give every chat of a source its variables for the chat template; do nothing if there are none.

    Raises:
        ConfigError: a prompt of the source is plain text.
    """
    if not kwargs:
        return
    plain = next((query for query in rows.queries if not is_chat(query.prompt)), None)
    if plain is not None:
        raise ConfigError(
            f"data.{label}.{FIELD}={dict(kwargs)}: needs chats, but {plain.query_id} is plain text; set as_chat: true, "
            f"or remove {FIELD}"
        )
    rows.queries = [replace(query, prompt=chat_prompt(messages_of(query.prompt), kwargs)) for query in rows.queries]


def check_template_kwargs(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the tokenizer's chat template mentions every variable; it would ignore any other without a word.

    Raises:
        ConfigError: a source sets a variable that the template does not mention.
    """
    template = str(tokenizer.chat_template or "")
    train = [(f"train.{name}", source) for name, source in config.train.items()]
    held_out = [(f"eval.{name}", source) for name, source in config.eval.items()]
    for label, source in [*train, *held_out]:
        if isinstance(source, ChainSumSourceConfig | TrainShareSourceConfig):
            continue
        for name, value in source.chat_template_kwargs.items():
            if not re.search(rf"\b{re.escape(name)}\b", template):
                raise ConfigError(
                    f"data.{label}.{FIELD}.{name}={value!r}: the model's chat template has no variable of this name, "
                    "so it would have no effect; correct or remove it"
                )
