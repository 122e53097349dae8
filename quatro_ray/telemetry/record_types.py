"""The types that readers of a run's files count on: a line that has others is taken for unreadable.

Storage can damage a line so that it still is JSON. Fields that are not named here may hold anything.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter, ValidationError

MAX_CLOCK_S = 2.0**37
"""Seconds since the epoch, in the year 6325; later times cannot be shown as a date."""
_LARGEST = 2**53
_Whole = Annotated[int, Field(ge=0, lt=_LARGEST)]
_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Count = Annotated[float, Field(ge=0, lt=_LARGEST)]
_Clock = Annotated[float, Field(ge=0, lt=MAX_CLOCK_S)]
_Digits = Annotated[str, Field(pattern=r"^[0-9]{1,15}$")]
_Counts = dict[_Digits, _Count]
_Part = Annotated[str, Field(pattern=r"\S")]


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class _Metrics(_Record):
    step: _Whole
    time_s: _Finite = 0.0
    step_s: _Finite | None = Field(None, alias="time/step_s")
    generated_per_s: _Finite | None = Field(None, alias="throughput/generated_tokens_per_s")
    num_trained: _Finite = Field(0, alias="tokens/trained")
    num_rollouts: _Finite = Field(0, alias="rollout/num")
    response_tokens: float | None = Field(None, alias="rollout/response_tokens_mean")
    pass_rate: float | None = Field(None, alias="pass_rate/mean")
    reward: float | None = Field(None, alias="reward/mean")
    skipped: _Finite = Field(0, alias="step/skipped")
    uninformative: _Finite = Field(0, alias="step/uninformative")
    staleness: float | None = Field(None, alias="off_policy/staleness_mean")
    max_staleness: float | None = Field(None, alias="off_policy/staleness_max")
    staleness_tokens: _Counts | None = Field(None, alias="off_policy/staleness_tokens")
    prompt_tokens: _Counts | None = Field(None, alias="rollout/prompt_tokens_histogram")
    response_lengths: _Counts | None = Field(None, alias="rollout/response_tokens_histogram")
    drift: list[float] | None = Field(None, alias="policy/realised_kl_nats")
    ratios: list[float] | None = Field(None, alias="rollout_corr/log_ratio_tokens")
    eta: list[float] | None = Field(None, alias="trust_region/eta")
    targets: list[float] | None = Field(None, alias="trust_region/target_log_ratio")


class _Event(_Record):
    event: str
    part: _Part
    time_s: _Finite = 0.0
    clock_s: _Clock = 0.0
    step: _Whole | None = None
    version: _Whole | None = None
    why: str | None = None


class _Evaluation(_Record):
    step: _Whole
    version: _Whole
    set: str


class _Span(_Record):
    role: _Part
    phase: str
    start: _Finite
    end: _Finite


class _Load(_Record):
    role: _Part
    t: _Finite
    num_running: _Whole
    kv_cache_usage: _Finite = 0.0


class _Rollout(_Record):
    text: str | None = None
    transcript: str | None = None
    finish_reason: str | None = None
    reward: float | None = None
    parts: dict[str, float] | None = None
    num_tokens: _Whole = 0
    versions: list[Annotated[list[JsonValue], Field(min_length=1)]] | None = None


class _Group(_Record):
    step: _Whole
    group_id: int
    prompt: str = ""
    rollouts: list[_Rollout] = []


class _Summary(_Record):
    """The numbers of summary.json that an audit compares with the ledger. It also tells which are missing."""

    groups: dict[str, _Whole] = {}
    drops: dict[str, _Whole] = {}
    groups_admitted: _Whole = 0
    learner_steps: _Whole = 0
    weight_updates: _Whole = 0
    trained_tokens: _Whole = 0
    generated_tokens: _Whole = 0
    staleness_tokens: dict[_Digits, _Whole] = {}
    evaluations: dict[str, JsonValue] = {}


_TYPES: dict[str, TypeAdapter[Any]] = {
    "metrics.jsonl": TypeAdapter(_Metrics),
    "events.jsonl": TypeAdapter(_Event),
    "evaluations.jsonl": TypeAdapter(_Evaluation),
    "timeline.jsonl": TypeAdapter(_Span | _Load),
    "timeline.1.jsonl": TypeAdapter(_Span | _Load),
    "rollouts.jsonl": TypeAdapter(_Group),
    "summary.json": TypeAdapter(_Summary),
}


def parse(name: str, line: str | bytes) -> dict[str, Any] | None:
    """Return the record in a line of a file, or None if it is no JSON object, or has other types than the run writes.

    Args:
        name: name of the file, such as "metrics.jsonl".
        line: the line, or the whole content of a file that is one record.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and not wrong_types(name, record) else None


def wrong_types(name: str, record: Mapping[str, Any]) -> list[str]:
    """Return the fields of a record that have other types than the run writes, each with what it should be.

    Args:
        name: name of the file, as for `parse`.
        record: a line of it, or its whole content.
    """
    if name not in _TYPES:
        return []
    try:
        _TYPES[name].validate_python(record)
    except ValidationError as error:
        return [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False)]
    return []


def number(record: Mapping[str, Any], name: str) -> float | None:
    """Return a metric that is a number and finite, or else None."""
    value = record.get(name)
    is_number = math.isfinite(value) if isinstance(value, float) else isinstance(value, int) and abs(value) < _LARGEST
    return value if is_number else None


def weighted_mean(records: Iterable[Mapping[str, Any]], name: str, weight: str) -> float | None:
    """Return the mean of a metric over the steps that have it, weighted with another one; None if none has both."""
    pairs = [(number(record, name), number(record, weight) or 0.0) for record in records]
    known = [(value, num) for value, num in pairs if value is not None]
    total = sum(num for _, num in known)
    return sum(value * num for value, num in known) / total if total else None
