"""Reads the datasets of the `verifiers` library's environments (0.1); environments/verifiers_library.py plays them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from quatro_ray.chats import chat_prompt
from quatro_ray.config import VerifiersSourceConfig
from quatro_ray.data.dataset import Rows
from quatro_ray.errors import ConfigError
from quatro_ray.types import Query

METADATA_KEY = "verifiers"
"""Key in Query.metadata; its value is the row of the environment's dataset, as JSON."""


def load(env: str, args: Mapping[str, Any]) -> Any:
    """Return an environment of the library.

    Args:
        env: its name.
        args: its own arguments.

    Raises:
        ConfigError: the library or the environment is not installed, or the environment offers OpenAI tools.
    """
    try:
        import verifiers
    except ImportError as error:
        raise ConfigError("the library `verifiers` is not installed: pip install 'verifiers==0.1.10'") from error
    import datasets

    datasets.disable_progress_bars()
    try:
        loaded = verifiers.load_environment(env, **args)
    except Exception as error:  # this runs the environment's own code, which may raise anything
        raise ConfigError(f"verifiers: the environment {env!r} cannot be loaded: {error}") from error
    if loaded.oai_tools:
        raise ConfigError(
            f"verifiers: the environment {env!r} offers tools by OpenAI tool calls, which need a parser for "
            "each model and are not supported; use one whose protocol is text"
        )
    return loaded


def verifiers_rows(config: VerifiersSourceConfig, label: str) -> Rows:
    """Return the queries of an environment's dataset.

    Raises:
        ConfigError: as `load` raises it.
    """
    environment = load(config.env, config.args)
    rows = environment.get_dataset() if config.split == "train" else environment.get_eval_dataset()
    queries = []
    for number, row in enumerate(rows):
        if config.max_rows is not None and number >= config.max_rows:
            break
        prompt = row["prompt"] if isinstance(row["prompt"], str) else chat_prompt(row["prompt"])
        metadata = {METADATA_KEY: json.dumps(row, default=str)}
        queries.append(Query(f"{label}:{number}", prompt, str(row.get("answer", "")), metadata))
    return Rows(queries)
