"""Every field of the configuration, with type, default and meaning, from the models themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from quatro_ray.config import Config


def describe_fields(section: str | None = None) -> str:
    """One block a field, `section.field: type = default`; only of one section where it is named.

    Raises:
        KeyError: there is no such section.
    """
    if section is not None and section not in Config.model_fields:
        raise KeyError(section)
    names = [section] if section else list(Config.model_fields)
    return "\n".join(line for name in names for line in _section(name, Config.model_fields[name]))


def _section(path: str, field: FieldInfo) -> Iterator[str]:
    if get_origin(field.annotation) is dict:
        path += ".NAME"
        if field.description:
            yield f"\n# {path}: " + " ".join(field.description.split())
    for model in _models(field.annotation):
        kind = model.model_fields.get("kind")
        which = f" (kind: {get_args(kind.annotation)[0]})" if kind else ""
        yield ""
        yield f"# {path}{which}: {_first_line(model.__doc__)}"
        for name, inner in model.model_fields.items():
            if name == "kind":
                continue
            if _models(inner.annotation):
                yield from _section(f"{path}.{name}", inner)
            else:
                yield _field(f"{path}.{name}", inner)


def _field(path: str, field: FieldInfo) -> str:
    default = "required" if field.default is PydanticUndefined else repr(field.default)
    rules = ", ".join(str(m) for m in field.metadata)
    lines = [f"{path}: {_type(field.annotation)} = {default}" + (f"  [{rules}]" if rules else "")]
    if field.description:
        lines.append("    " + " ".join(field.description.split()))
    return "\n".join(lines)


def _models(annotation: Any) -> list[type[BaseModel]]:
    """All in it, however deep: unions, and dictionaries of unions."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _type(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")


def _first_line(text: str | None) -> str:
    return (text or "").strip().splitlines()[0] if text else ""
