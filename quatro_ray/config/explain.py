"""Translates pydantic's errors to one line for each broken rule: field, value, rule, remedy."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args, get_origin

from pydantic import JsonValue, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from quatro_ray.config.base import BrokenRules, Section
from quatro_ray.config.field_types import accepts, field_type, kind_of, sections_in


@dataclass(frozen=True)
class _Place:
    """A place in the configuration, with what the sections say of it."""

    path: str
    section: type[Section] | None
    """The innermost section that holds the place; None within free-form values."""
    field: object
    """FieldInfo or type of what stands there; None for unknown fields and within free-form values."""


def explain(error: ValidationError, root: type[Section]) -> list[str]:
    """Return one line for each rule that a configuration of type `root` breaks."""
    errors = [details for details in error.errors(include_url=False) if not _follows_from_another(details)]
    return [line for details in errors for line in _lines(details, root)]


def _follows_from_another(error: ErrorDetails) -> bool:
    """Tell if a list counts as too short only because pydantic left out entries that have errors themselves."""
    return error["type"] == "too_short" and len(error["input"]) >= error["ctx"]["min_length"]


def _lines(error: ErrorDetails, root: type[Section]) -> Iterator[str]:
    place = _find(error["loc"], root)
    reason = error.get("ctx", {}).get("error")
    if isinstance(reason, BrokenRules):
        yield from (f"{place.path}.{rule}" if place.path else rule for rule in reason.rules)
    elif error["type"] == "extra_forbidden":
        yield f"{place.path}: unknown field; {_correction(place, root)}"
    elif error["type"] == "missing":
        yield f"{place.path}: required field is missing; add it"
    elif error["type"] == "union_tag_not_found":
        yield f"{place.path}.kind: required field is missing; add it, {_kinds(place)}{_unspaced(error['input'])}"
    elif error["type"] == "union_tag_invalid":
        tag = error["ctx"]["tag"]
        close = _close(tag, (str(kind_of(section)) for section in sections_in(place.field)))
        yield f"{place.path}.kind={tag!r}: must be {_kinds(place)}; {close or 'change it'}"
    elif error["loc"][-1:] == ("[key]",):
        yield f"{place.path.removesuffix('.[key]')}: a name must be a string, not {error['input']!r}; quote it"
    elif error["type"] == "value_error":
        yield f"{place.path}{_shown(error['input'], place)}: {reason}"
    else:
        remedy = _remedy(error, place)
        yield f"{place.path}{_shown(error['input'], place)}: must be {_rule(error, place)}; {remedy}"


def _find(location: tuple[str | int, ...], root: type[Section]) -> _Place:
    """Follow an error's location through the sections, leaving out the kinds that pydantic puts behind a field."""
    names: list[str] = []
    section: type[Section] | None = None
    here: object = root
    for step in location:
        bare = field_type(here).bare
        if bare is JsonValue:  # pydantic goes on with its own names of JSON's types
            break
        kinds = {kind_of(inner): inner for inner in sections_in(bare)}
        if get_origin(bare) in (dict, tuple):
            here = get_args(bare)[1 if get_origin(bare) is dict else 0]
        elif len(kinds) > 1 and step in kinds:
            here = kinds[str(step)]
            continue
        else:
            section = next(sections_in(bare), None)
            here = section.model_fields.get(str(step)) if section else None
        names.append(str(step))
    return _Place(".".join(names), section, here)


def _shown(value: object, place: _Place) -> str:
    """Return `=value` as YAML would have it, or nothing for values that are long or may be secret."""
    if (isinstance(place.field, FieldInfo) and not place.field.repr) or (isinstance(value, dict | list) and value):
        return ""
    if value is None or isinstance(value, bool):
        return f"={json.dumps(value)}"
    return f"={value!r}" if isinstance(value, str | int | float | dict | list) else f"={value}"


def _rule(error: ErrorDetails, place: _Place) -> str:
    if error["type"] == "finite_number" or place.field is None:
        return error["msg"].removeprefix("Input should be ")
    return accepts(place.field)


def _remedy(error: ErrorDetails, place: _Place) -> str:
    given = error["input"]
    bare = field_type(place.field).bare
    if isinstance(given, str) and get_origin(bare) is Literal:
        return _close(given, map(str, get_args(bare))) or "change it"
    kinds = [str(kind_of(section)) for section in sections_in(bare)]
    if isinstance(given, str) and given in kinds:
        return f"write {{kind: {given}}}"
    return "change it"


def _close(given: str, allowed: Iterable[str]) -> str | None:
    """Return `did you mean …?` with the most similar word, or None if none is similar."""
    close = difflib.get_close_matches(given, list(allowed), n=1)
    return f"did you mean {close[0]}?" if close else None


def _unspaced(value: object) -> str:
    """Return a hint if a mapping has a key such as `kind:jsonl`, which YAML reads as a name without a value."""
    names = [str(key) for key, inner in value.items() if inner is None] if isinstance(value, dict) else []
    found = next((name for name in names if name.startswith("kind:")), None)
    return f" (YAML needs a blank after the colon: {found.replace(':', ': ', 1)})" if found else ""


def _kinds(place: _Place) -> str:
    return "one of " + ", ".join(str(kind_of(section)) for section in sections_in(place.field))


def _correction(place: _Place, root: type[Section]) -> str:
    parents, _, name = place.path.rpartition(".")
    command = " ".join(["quatro-ray fields", *parents.split(".")[:1]]).strip()
    listed = f"(`{command}` lists all)"
    if place.section and (successor := place.section.removed.get(name)):
        return f"it was removed: {successor}; remove it"
    if place.section and (close := difflib.get_close_matches(name, place.section.model_fields, n=1, cutoff=0.75)):
        return f"did you mean {f'{parents}.' if parents else ''}{close[0]}? {listed}"
    paths = sorted(_paths(root, ""), key=lambda path: path.count("."), reverse=True)
    elsewhere = {path.rpartition(".")[2]: path for path in paths}  # of the same name, the one that is least deep
    if close := difflib.get_close_matches(name, elsewhere, n=1, cutoff=0.75):
        return f"did you mean {elsewhere[close[0]]}? {listed}"
    return f"remove it or correct its spelling {listed}"


def _paths(section: type[Section], prefix: str) -> Iterator[str]:
    """Yield the path of every field that does not stand below a name which the user gives."""
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}"
        bare = field_type(field).bare
        if get_origin(bare) is not dict:
            for inner in sections_in(bare):
                yield from _paths(inner, f"{prefix}{name}.")
