"""Reads all data of a run. A new kind of source needs its function here and its section in config/data.py."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from hashlib import sha256

from quatro_ray.config import (
    ChainSumSourceConfig,
    DataConfig,
    ReasoningGymSourceConfig,
    RewardConfig,
    SourceConfig,
    TrainShareSourceConfig,
    VerifiersSourceConfig,
)
from quatro_ray.data.dataset import Dataset, Rows
from quatro_ray.data.held_out import HeldOut
from quatro_ray.data.reasoning_gym import chain_sum, reasoning_gym_task
from quatro_ray.data.rows import read_rows
from quatro_ray.data.template_kwargs import add_template_kwargs
from quatro_ray.data.verifiers_library import verifiers_rows
from quatro_ray.errors import DataError, Problems
from quatro_ray.rewards.query_checks import QueryChecks
from quatro_ray.types import Query

_GENERATED = (ChainSumSourceConfig, ReasoningGymSourceConfig, VerifiersSourceConfig)
_WARMUP_HELD_OUT = 128
HELD_OUT = "it is held out"
"""The rule by which rows are left out whose prompts are held out."""


def make_dataset(
    config: DataConfig, rewards: Mapping[str, RewardConfig], say: Callable[[str], None] = lambda _: None
) -> Dataset:
    """Read and generate all queries, and check each query with the rewards that will score its responses.

    Args:
        config: the sources.
        rewards: by name.
        say: shows a line of progress, every few seconds if there are many rows.

    Raises:
        DataError: a row cannot be used and data.bad_rows=refuse, or no query of a source is left.
        ConfigError: a generator or a reward cannot be made.
        SeveralErrors: several sources have such a problem.
    """
    checks = QueryChecks(rewards, say)
    refuse = config.bad_rows == "refuse"
    train, held_out = _read_all(config, refuse)
    together = {f"train.{n}": r for n, r in train.items()} | {f"eval.{n}": r for n, r in held_out.items()}
    problems = Problems()
    for label, rows in together.items():
        with problems.collect():
            _drop_unscorable(rows, label, checks, refuse)
    problems.refuse()
    reserved = HeldOut(held_out.values())
    for name, rows in train.items():
        generated = isinstance(config.train[name], _GENERATED)
        with problems.collect():
            _drop_held_out(rows, f"train.{name}", reserved, refuse and not generated)
    problems.refuse()
    warmup = (_all(train), _all(held_out))
    if config.warmup is not None:
        together["warmup"] = rows = _read_warmup(config.warmup, reserved, refuse)
        warmup = (rows.queries[_WARMUP_HELD_OUT:], rows.queries[:_WARMUP_HELD_OUT])
    return Dataset(
        train={name: rows.queries for name, rows in train.items()},
        weights={name: config.train[name].weight or float(len(rows.queries)) for name, rows in train.items()},
        held_out={name: rows.queries for name, rows in held_out.items()},
        skipped={label: rows.skipped for label, rows in together.items()},
        warmup=warmup,
    )


def _read_all(config: DataConfig, refuse: bool) -> tuple[dict[str, Rows], dict[str, Rows]]:
    """Return the rows of data.train and of data.eval, by the name of the source."""
    train: dict[str, Rows] = {}
    held_out: dict[str, Rows] = {}
    problems = Problems()
    for name, source in config.train.items():
        with problems.collect():
            train[name] = _read(source, name, f"train.{name}", refuse)
    for name, held in config.eval.items():
        with problems.collect():
            if not isinstance(held, TrainShareSourceConfig):
                held_out[name] = _read(held, name, f"eval.{name}", refuse)
            elif held.source in train:  # else the source's own problem is told
                held_out[name] = _take_share(held, name, train[held.source])
    problems.refuse()
    return train, held_out


def _all(sources: Mapping[str, Rows]) -> list[Query]:
    return [query for rows in sources.values() for query in rows.queries]


def _read_warmup(source: SourceConfig, reserved: HeldOut, refuse: bool) -> Rows:
    rows = _read(source, "warmup", "warmup", refuse)
    _drop_held_out(rows, "warmup", reserved, refuse and not isinstance(source, _GENERATED))
    if (num := len(rows.queries)) <= _WARMUP_HELD_OUT:
        raise DataError(f"data.warmup: has {num} rows; give more than {_WARMUP_HELD_OUT}, which are held out")
    return rows


def _read(source: SourceConfig, name: str, label: str, refuse: bool) -> Rows:
    if isinstance(source, ChainSumSourceConfig):
        rows = chain_sum(source, label)
    elif isinstance(source, ReasoningGymSourceConfig):
        rows = reasoning_gym_task(source, label)
    elif isinstance(source, VerifiersSourceConfig):
        rows = verifiers_rows(source, label)
    else:
        rows = read_rows(source, label, refuse=refuse)
    if not isinstance(source, ChainSumSourceConfig):
        add_template_kwargs(rows, source.chat_template_kwargs, label)
    rows.queries = [replace(query, source=name) for query in rows.queries]
    return rows


def _take_share(config: TrainShareSourceConfig, name: str, source: Rows) -> Rows:
    """Move a share of a source's distinct questions to a held-out set, those with the smallest hashes."""

    def draw(question: str) -> bytes:
        return sha256(f"{config.seed}/{question}".encode()).digest()

    asked = [(_asked(source, query), query) for query in source.queries]
    questions = sorted({question for question, _ in asked}, key=draw)
    taken = set(questions[: max(1, round(config.share * len(questions)))])
    first: dict[str, Query] = {}
    for question, query in asked:
        if question in taken:
            first.setdefault(question, query)
    rows = Rows([replace(query, source=name) for query in first.values()])
    rows.places = {query.query_id: source.places.get(query.query_id, query.query_id) for query in rows.queries}
    rows.questions = {q.query_id: source.questions[q.query_id] for q in rows.queries if q.query_id in source.questions}
    kept = [query for question, query in asked if question not in taken]
    source.skipped[HELD_OUT] += len(asked) - len(kept)
    _keep(source, kept, f"train.{config.source}")
    return rows


def _asked(rows: Rows, query: Query) -> str:
    """Return the text by which a question is recognised."""
    if (known := rows.questions.get(query.query_id)) is not None:
        return known.text
    return " ".join(query.prompt.split())


def _drop_unscorable(rows: Rows, label: str, checks: QueryChecks, refuse: bool) -> None:
    kept = []
    for query, reason in zip(rows.queries, checks.reasons(rows.queries, label), strict=True):
        if reason is None:
            kept.append(query)
        elif refuse:
            place = rows.places.get(query.query_id, query.query_id)
            raise DataError(
                f"{place}: {reason}, not {query.answer[:40]!r}; correct the row, or set data.bad_rows: skip"
            )
        else:
            rows.skipped[reason] += 1
    _keep(rows, kept, label)


def _drop_held_out(rows: Rows, label: str, reserved: HeldOut, refuse: bool) -> None:
    left_out = [query for query in rows.queries if reserved.has(rows, query)]
    if refuse and left_out:
        first = left_out[0]
        raise DataError(
            f"data.{label}: {len(left_out)} prompts are also in data.eval (first: "
            f"{rows.places[first.query_id]}, {first.prompt[:60]!r}); remove them, or set data.bad_rows: skip"
        )
    rows.skipped[HELD_OUT] += len(left_out)
    _keep(rows, [query for query in rows.queries if not reserved.has(rows, query)], label)


def _keep(rows: Rows, kept: list[Query], label: str) -> None:
    if not kept:
        shown = "; ".join(f"{n} × {reason}" for reason, n in (+rows.skipped).most_common(3))
        raise DataError(f"data.{label}: no query is left ({shown})")
    rows.queries = kept


def describe(dataset: Dataset) -> list[str]:
    """Return one line of text for each source: its number of queries, and what was left out."""
    num = {f"train.{name}": len(queries) for name, queries in dataset.train.items()}
    num |= {f"eval.{name}": len(queries) for name, queries in dataset.held_out.items()}
    if "warmup" in dataset.skipped:
        num["warmup"] = sum(map(len, dataset.warmup))
    return [f"data.{label}: {number:,} queries{_left_out(dataset.skipped[label])}" for label, number in num.items()]


def _left_out(skipped: Counter[str]) -> str:
    """Return how many rows were left out, and by which rules; empty if there are none."""
    counts = (+skipped).most_common()
    if not counts:
        return ""
    rules = "; ".join(f"{n:,} × {rule}" if len(counts) > 1 else rule for rule, n in counts)
    return f"; {skipped.total():,} left out: {rules}"
