"""From a YAML file to a validated configuration, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from quatro_ray.config.tree import Config
from quatro_ray.errors import ConfigError


def load_config(path: Path, overrides: list[str] | None = None) -> Config:
    """Reads YAML, applies overrides, validates. `section.field=value` or `section.field=@file.yaml`.

    Raises:
        ConfigError: one message with every broken rule: field, value, rule, remedy.
    """
    try:
        tree = yaml.load(path.read_text(), _Loader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give the path of a YAML file") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or no date that there is
        raise ConfigError(f"{path}: is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must be a mapping of sections, not {type(tree).__name__}")
    for override in overrides or []:
        _apply_override(tree, override)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{path}: " + "; ".join(_explain(e, tree) for e in error.errors())) from error


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, of which YAML's own would drop the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        if twice := sorted({str(key) for key in keys if keys.count(key) > 1}):
            raise yaml.constructor.ConstructorError(
                None, None, f"{twice[0]!r} stands twice in one mapping; remove one of them", node.start_mark
            )
        return super().construct_mapping(node, deep)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, sep, text = override.partition("=")
    parts = key.split(".")
    if not sep or not all(parts):
        raise ConfigError(f"override {override!r}: must have the form section.field=value")
    try:
        value = yaml.load(Path(text[1:]).read_text() if text.startswith("@") else text, _Loader)
    except OSError as error:
        raise ConfigError(f"override {override!r}: the file cannot be read ({error.strerror}); correct it") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"override {override!r}: is not YAML ({' '.join(str(error).split())}); quote it") from error
    node = tree
    for part in parts[:-1]:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {part!r} is a value, not a section")
    # YAML 1.1 reads 1e-4 as text; pydantic reads it as the number it is
    node[parts[-1]] = value


def _explain(error: Any, tree: Any) -> str:
    where = ".".join(_fields(error["loc"], tree)) or "config"
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown field; remove it or correct its spelling (`quatro-ray fields` lists all)"
    if error["type"] == "missing":
        return f"{where}: required field is missing; add it"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{where}: {message}" if error["loc"] else message
    return f"{where}={error['input']!r}: {message}; change this value"


def _fields(location: tuple[str | int, ...], node: Any) -> list[str]:
    """Without the kinds that pydantic puts behind a field of several kinds."""
    fields: list[str] = []
    for part in location:
        if isinstance(node, dict) and part not in node and node.get("kind") == part:
            continue
        fields.append(str(part))
        is_there = (isinstance(node, dict) and part in node) or (isinstance(node, list) and part in range(len(node)))
        node = node[part] if is_there else None
    return fields


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
