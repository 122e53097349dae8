"""The reference of all fields that `quatro-ray fields` prints, made from the sections themselves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from quatro_ray.config.field_types import accepts, field_type, kind_of, sections_in
from quatro_ray.config.schema import Config


def describe_fields(section: str | None = None) -> str:
    """Describe every field: `section.field: what it accepts; default`, and on the next line its meaning.

    Args:
        section: describe only this section of the configuration.

    Raises:
        KeyError: there is no such section.
    """
    if section is not None and section not in Config.model_fields:
        raise KeyError(section)
    names = [section] if section else list(Config.model_fields)
    return "\n".join(line for name in names for line in _section(name, Config.model_fields[name]))


def _section(path: str, field: FieldInfo) -> Iterator[str]:
    if get_origin(field_type(field).bare) is dict:
        path += ".NAME"
    yield f"\n# {path}: {_one_line(field.description)}"
    for section in sections_in(field):
        kind = kind_of(section)
        yield (f"\n# {path} (kind: {kind}): " if kind else "# ") + _one_line(section.__doc__)
        for name, inner in section.model_fields.items():
            if name == "kind":
                continue
            if any(sections_in(inner)):
                yield from _section(f"{path}.{name}", inner)
            else:
                yield _field(f"{path}.{name}", inner)


def _field(path: str, field: FieldInfo) -> str:
    default = "required" if field.default is PydanticUndefined else f"default {_value(field.default)}"
    return f"{path}: {accepts(field)}; {default}\n    {_one_line(field.description)}"


def _value(value: object) -> str:
    """Return a default as YAML would have it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())
