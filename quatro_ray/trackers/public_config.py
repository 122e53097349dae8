"""The configuration as it may leave the machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quatro_ray.config import Section
from quatro_ray.telemetry.logs import without_secrets


def public_config(section: Section) -> dict[str, Any]:
    """Return a section as JSON values: without the fields that messages do not show, and with secrets in text masked.

    Fields that messages do not show (`repr=False`) are those into which a user may have written a secret, such as the
    URLs of reward servers and the further arguments of engines.
    """
    shown = (name for name, field in type(section).model_fields.items() if field.repr)
    return {name: _public(getattr(section, name)) for name in shown}


def _public(value: object) -> object:
    if isinstance(value, Section):
        return public_config(value)
    if isinstance(value, Mapping):
        return {str(name): _public(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_public(inner) for inner in value]
    return without_secrets(str(value)) if isinstance(value, str | Path) else value
