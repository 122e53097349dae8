"""Describes in words what a field accepts, and finds the sections that its type holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import JsonValue
from pydantic.fields import FieldInfo

from quatro_ray.config.base import Accepts, Section

_NOUNS: dict[object, tuple[str, str]] = {
    int: ("an integer", "integers"),
    float: ("a number", "numbers"),
    str: ("a string", "strings"),
    Path: ("a path", "paths"),
    bool: ("true or false", "values true or false"),
    JsonValue: ("a JSON value", "JSON values"),
    object: ("any value", "values"),
}
_SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


class FieldType(NamedTuple):
    """A field's type without its wrappers: `Annotated`, and `None` of an optional one."""

    bare: object
    metadata: tuple[object, ...]
    nullable: bool


def field_type(annotation: object, metadata: Sequence[object] = ()) -> FieldType:
    """Unwrap a type as it stands in a section, or the type and metadata of a pydantic FieldInfo."""
    if isinstance(annotation, FieldInfo):
        return field_type(annotation.annotation, annotation.metadata)
    if get_origin(annotation) is Annotated:
        bare, *inner = get_args(annotation)
        return field_type(bare, [*inner, *metadata])
    options = [option for option in get_args(annotation) if option is not NoneType]
    if get_origin(annotation) in (Union, UnionType) and len(options) == 1:
        return field_type(options[0], metadata)._replace(nullable=True)
    return FieldType(annotation, tuple(metadata), NoneType in get_args(annotation))


def accepts(annotation: object) -> str:
    """Return what a field accepts, such as `an integer ≥ 1`, `a number in (0, 1]` or `one of auto, nccl, gloo`."""
    bare, metadata, nullable = field_type(annotation)
    for words in metadata:
        if isinstance(words, Accepts):
            return words.text + (" or null" if nullable else "")
    return _words(bare, metadata) + (" or null" if nullable else "")


def _words(bare: object, metadata: Sequence[object]) -> str:
    origin, arguments = get_origin(bare), get_args(bare)
    limits = {sign: value for m in metadata for sign in _SIGNS if (value := getattr(m, sign, None)) is not None}
    if origin is Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(map(str, arguments))
    if origin is tuple:
        return f"a list of {_NOUNS[field_type(arguments[0]).bare][1]}" + _at_least(metadata)
    if origin is dict:
        return "a mapping" + _at_least(metadata)
    if list(sections_in(bare)):
        return "a mapping of fields"
    return _NOUNS[bare][0] + _range(limits)


def _range(limits: dict[str, object]) -> str:
    if len(limits) < 2:
        return "".join(f" {_SIGNS[sign]} {value}" for sign, value in limits.items())
    low = f"[{limits['ge']}" if "ge" in limits else f"({limits['gt']}"
    high = f"{limits['le']}]" if "le" in limits else f"{limits['lt']})"
    return f" in {low}, {high}"


def _at_least(metadata: Sequence[object]) -> str:
    return "".join(
        f" with at least {n} entr{'y' if n == 1 else 'ies'}"
        for m in metadata
        if (n := getattr(m, "min_length", None)) is not None
    )


def sections_in(annotation: object) -> Iterator[type[Section]]:
    """Yield the sections that a type holds, however deep: in unions, and in dictionaries of unions."""
    if isinstance(annotation, FieldInfo):
        yield from sections_in(annotation.annotation)
    elif isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    else:
        for inner in get_args(annotation):
            yield from sections_in(inner)


def kind_of(section: type[Section]) -> str | None:
    """Return the value of `kind` that chooses this section among several, or None if it has no such field."""
    field = section.model_fields.get("kind")
    return str(get_args(field.annotation)[0]) if field else None
