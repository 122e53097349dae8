"""Loads a configuration from YAML and command-line overrides, and dumps it as YAML."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path

import yaml
from pydantic import ValidationError

from quatro_ray.config.explain import explain
from quatro_ray.config.paths import Paths, paths_of_this_process
from quatro_ray.config.schema import Config
from quatro_ray.errors import ConfigError

_PACKAGED = Path(__file__).with_name("packaged")


def load_config(path: Path, overrides: list[str] | None = None, paths: Paths | None = None) -> Config:
    """Load a YAML file, apply overrides and validate the result.

    Args:
        path: the YAML file, or the name of a packaged configuration, such as "demo".
        overrides: texts of the form `section.field=value` or `section.field=@file.yaml`, applied in order.
        paths: where relative paths in the configuration start; None: where this process says.

    Raises:
        ConfigError: the file or an override cannot be read, or rules are broken. The message names all broken rules,
            each in one line: field, value, rule, remedy.
    """
    try:
        tree = yaml.load(find_config(path).read_text(), _Loader)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}; the current directory is {Path.cwd()}); give the path of a "
            f"YAML file, or the name of a packaged configuration: {', '.join(packaged_configs())}"
        ) from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or an impossible date
        raise ConfigError(f"{path}: is not YAML: {_one_line(error)}; correct it") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must be a mapping of sections, not {type(tree).__name__}; correct it")
    _apply_overrides(tree, overrides or [])
    try:
        return Config.model_validate(tree, context=paths or paths_of_this_process())
    except ValidationError as error:
        raise ConfigError(_together(str(path), explain(error, Config))) from error


def packaged_configs() -> list[str]:
    """Return the names of the configurations that the package brings."""
    return sorted(path.stem for path in _PACKAGED.glob("*.yaml"))


def find_config(path: Path) -> Path:
    """Return the file of a packaged configuration if the path is its name and no file is there, else the path."""
    is_name = str(path) in packaged_configs() and not path.is_file()
    return _PACKAGED / f"{path}.yaml" if is_name else path


def dump_config(config: Config) -> str:
    """Return the resolved configuration as YAML, which `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """A safe loader that refuses duplicate keys in a mapping, of which YAML's own would drop the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        if twice := sorted({str(key) for key in keys if keys.count(key) > 1}):
            raise yaml.constructor.ConstructorError(
                None, None, f"{twice[0]!r} stands twice in one mapping; remove one of them", node.start_mark
            )
        return super().construct_mapping(node, deep)


def _apply_overrides(tree: dict[str, object], overrides: list[str]) -> None:
    problems = []
    for override in overrides:
        try:
            _apply_override(tree, override)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError(problems[0] if len(problems) == 1 else _together("overrides", problems))


def _apply_override(tree: dict[str, object], override: str) -> None:
    key, sep, text = override.partition("=")
    names = key.split(".")
    if not sep or not all(names):
        raise ConfigError(f"override {override!r}: must have the form section.field=value; correct it")
    try:
        value = yaml.load(Path(text[1:]).read_text() if text.startswith("@") else text, _Loader)
    except OSError as error:
        raise ConfigError(f"override {override!r}: the file cannot be read ({error.strerror}); correct it") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"override {override!r}: is not YAML ({_one_line(error)}); quote it") from error
    node = tree
    for name in names[:-1]:
        inner = node.setdefault(name, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"override {override!r}: {name!r} is a value, not a section; correct the field's name")
        node = inner
    # YAML 1.1 reads 1e-4 as text; pydantic reads it as the number it is
    node[names[-1]] = value


def _together(subject: str, problems: list[str]) -> str:
    """Return one message: one line if there is one problem, else a heading and a line for each."""
    if len(problems) == 1:
        return f"{subject}: {problems[0]}"
    return "\n  ".join([f"{subject}: {len(problems)} rules are broken", *problems])


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
