"""Makes queries of the rows of files and Hugging Face datasets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from quatro_ray.chats import as_messages, chat_prompt, is_chat
from quatro_ray.data.dataset import Rows
from quatro_ray.data.held_out import Question, question_of
from quatro_ray.data.readers import BadRow, Row, RowSource, read
from quatro_ray.errors import DataError
from quatro_ray.rewards.extract import extract
from quatro_ray.types import Query

_PROMPT_KEYS = ("prompt", "messages", "question", "problem", "query", "input")
_ANSWER_KEYS = (
    "answer", "reward_model.ground_truth", "ground_truth", "final_answer", "label", "solution", "target",
)  # fmt: skip


def read_rows(config: RowSource, label: str, *, refuse: bool) -> Rows:
    """Return the queries of a source; rows that cannot be used are counted.

    Args:
        config: path of the source, its columns and its prompt template.
        label: section of the data, which begins the ids of its queries.
        refuse: raise for the first row that cannot be used, instead of counting it.

    Raises:
        DataError: the source cannot be read, has no usable row, or has an unusable one and `refuse` is set.
    """
    rows = Rows()
    for number, (place, row) in enumerate(read(config, label)):
        if number == config.max_rows:
            break
        try:
            if isinstance(row, BadRow):
                raise row
            query = _to_query(row, config, f"{label}:{number}")
        except BadRow as error:
            if refuse:
                raise DataError(f"{place}: {error}; correct it, or set data.bad_rows: skip") from error
            rows.skipped[error.rule] += 1
        else:
            rows.queries.append(query)
            rows.places[query.query_id] = place
            rows.questions[query.query_id] = _question(row, config)
    if not rows.queries:
        raise DataError(
            f"data.{label}.path: {_path(config)} has no row that can be used ({_shown(rows)}); correct the rows, or "
            "give another file"
        )
    return rows


def _path(config: RowSource) -> str:
    return config.path if isinstance(config.path, str) else ", ".join(config.path)


def _shown(rows: Rows) -> str:
    return "; ".join(f"{n} rows: {reason}" for reason, n in rows.skipped.items()) or "it is empty"


def _to_query(row: Row, config: RowSource, query_id: str) -> Query:
    prompt = _prompt(row, _column(row, config.prompt_key, _PROMPT_KEYS, "prompt_key"), config)
    answer = _answer(_column(row, config.answer_key, _ANSWER_KEYS, "answer_key"), config)
    if not _is_text(prompt) or not _is_text(answer):
        raise BadRow("contains a lone surrogate, which is not a valid character")
    return Query(query_id, prompt, answer, _metadata(row, config))


def _question(row: Row, config: RowSource) -> Question:
    value: Any = _column(row, config.prompt_key, _PROMPT_KEYS, "prompt_key")
    if not isinstance(value, str):
        return question_of(value)
    shown = [
        row[key] for key in row if key != "prompt" and row[key] != value and f"{{{key}}}" in config.prompt_template
    ]
    return question_of(value, shown)


def _metadata(row: Row, config: RowSource) -> dict[str, Any]:
    """Return all columns but those of the prompt and the answer, as JSON values.

    What JSON does not have becomes text, and NaN and infinities become None.
    """
    used = {
        next((candidate for candidate in ([key] if key else usual) if _look_up(row, candidate)[0]), None)
        for key, usual in ((config.prompt_key, _PROMPT_KEYS), (config.answer_key, _ANSWER_KEYS))
    }
    others = {name: value for name, value in row.items() if name not in used}
    metadata: dict[str, Any] = json.loads(json.dumps(others, default=str), parse_constant=lambda _: None)
    return metadata


def _is_text(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _column(row: Row, key: str | None, usual: tuple[str, ...], field: str) -> object:
    for candidate in [key] if key is not None else usual:
        found, value = _look_up(row, candidate)
        if found:
            return value
    wanted = f"has no column {key!r}" if key is not None else f"has none of the columns {', '.join(usual)}"
    other = " (to any column if no reward reads the answer)" if field == "answer_key" else ""
    raise BadRow(wanted, f"; it has {sorted(row)}: set {field}{other}")


def _look_up(row: object, key: str) -> tuple[bool, object]:
    """Return whether the row has the column, and its value; `a.b` is a column of that name, or column b within a."""
    if isinstance(row, dict) and key in row:
        return True, row[key]
    head, dot, rest = key.partition(".")
    if dot and isinstance(row, dict) and head in row:
        return _look_up(row[head], rest)
    return False, None


def _prompt(row: Row, value: object, config: RowSource) -> str:
    if isinstance(value, str) and value.strip():
        text = _fill(config.prompt_template, row | {"prompt": value})
        if config.as_chat or config.system_prompt is not None:
            return chat_prompt(as_messages(text, config.system_prompt))
        if is_chat(text):
            raise BadRow(
                "the prompt is the JSON text of chat messages: give it as a list of messages with role and content"
            )
        return text
    if isinstance(value, list) and value and all(_is_message(m) for m in value):
        if value[-1]["role"] == "assistant":
            raise BadRow(
                "the last message is the assistant's, so the prompt would contain a response: remove that message"
            )
        messages = value if value[0]["role"] == "system" else [*_system(config), *value]
        return chat_prompt(messages)
    raise BadRow("the prompt must be text, or a list of messages with role and content")


def _fill(template: str, row: Mapping[str, object]) -> str:
    """Return the template with `{column}` replaced; braces in values, and braces without a column, stay as they are."""
    pieces = template.split("{")
    out = pieces[0]
    for piece in pieces[1:]:
        key, brace, rest = piece.partition("}")
        if brace and key in row:
            if not isinstance(row[key], (str, int, float)):
                raise BadRow(f"prompt_template uses the column {key!r}, which has no text or number here")
            out += f"{row[key]}{rest}"
        else:
            out += "{" + piece
    return out


def _system(config: RowSource) -> list[dict[str, str]]:
    return [] if config.system_prompt is None else [{"role": "system", "content": config.system_prompt}]


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def _is_scalar(value: object) -> bool:
    return isinstance(value, (str, int, float)) and not isinstance(value, bool)


def _answer(value: object, config: RowSource) -> str:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        value = value[0]  # OlympiadBench's final_answer
    if isinstance(value, list) and value and all(_is_scalar(item) for item in value):
        return json.dumps([str(item) for item in value], ensure_ascii=False)  # several answers
    if isinstance(value, (dict, list)):
        return json.dumps(value)  # test cases of programs
    if value is None or isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise BadRow("the answer must be text, a number or test cases", f", not {type(value).__name__}")
    if value == "" or value != value:
        raise BadRow("the answer is missing (empty, or not a number)")
    answer = extract(str(value), config.answer_extract)
    if answer is None:
        raise BadRow(f"answer_extract={config.answer_extract} finds nothing in the answer")
    if not answer:
        raise BadRow("the answer is missing (blank)")
    return answer
