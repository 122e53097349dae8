"""A user's own prompts and answers from JSON-lines files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quatro_ray.config import JsonLinesTaskConfig
from quatro_ray.errors import DataError
from quatro_ray.tasks.prompts import chat_prompt
from quatro_ray.types import Query


class JsonLinesDataset:
    """Raises DataError, naming file and line, at the first row that cannot be used."""

    def __init__(self, config: JsonLinesTaskConfig) -> None:
        self.train = _read(config.train_path, config)
        self.held_out = _read(config.eval_path, config)
        if shared := {q.prompt for q in self.train} & {q.prompt for q in self.held_out}:
            raise DataError(
                f"{config.eval_path}: {len(shared)} held-out prompts also stand in {config.train_path} "
                f"(first: {min(shared)[:60]!r}); remove them from one of the two"
            )


def _read(path: Path, config: JsonLinesTaskConfig) -> list[Query]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})") from error
    queries = [_parse(path, n, line, config) for n, line in enumerate(lines, start=1) if line.strip()]
    if not queries:
        raise DataError(f"{path}: has no rows; one JSON object a line is expected")
    return queries


def _parse(path: Path, number: int, line: str, config: JsonLinesTaskConfig) -> Query:
    where = f"{path}:{number}"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: is not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: must be a JSON object, not {type(row).__name__}")
    for key in (config.prompt_key, config.answer_key):
        if key not in row:
            raise DataError(f"{where}: has no field {key!r}; it has {sorted(row)}: set task.prompt_key / answer_key")
    answer = _answer(where, row[config.answer_key], config)
    return Query(query_id=f"{path.name}:{number}", prompt=_prompt(where, row[config.prompt_key]), answer=answer)


def _prompt(where: str, value: Any) -> str:
    if isinstance(value, str) and value:
        return value
    if (
        isinstance(value, list)
        and value
        and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value)
    ):
        return chat_prompt(value)
    raise DataError(f"{where}: the prompt must be text, or a list of messages with role and content")


def _answer(where: str, value: Any, config: JsonLinesTaskConfig) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise DataError(f"{where}: the answer must be text or a number, not {type(value).__name__}")
    text = str(value).strip()
    if config.verifier == "integer":
        try:
            int(text)
        except ValueError as error:
            raise DataError(f"{where}: verifier 'integer' needs an integer answer, not {text[:40]!r}") from error
    return text
