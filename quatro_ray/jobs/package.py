"""Collects the configuration of a job and the local files that it names in a folder, which travels to the cluster."""

from __future__ import annotations

import glob
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from quatro_ray.config import Config, dump_config, load_config
from quatro_ray.config.paths import JobPaths
from quatro_ray.errors import ConfigError
from quatro_ray.telemetry.logs import SECRET_NAME, without_secrets

CONFIG = "config.yaml"
"""Name of the resolved configuration in the folder."""

_MAX_BYTES = 200 * 2**20
"""Ray keeps the package in the memory of the head, and every node unpacks it."""

_AFTER_CHECKPOINT_S = 30
"""Seconds beyond `checkpoint.grace_s` that a stopped job gets to end its actors."""


@dataclass(frozen=True)
class JobPackage:
    """A job before it is sent to the cluster.

    Attributes:
        config: the resolved configuration. Its relative paths start in the folder.
        files: the local files in the folder besides the configuration, as relative paths.
        environment: variables of all processes of the job. Everyone who may use the cluster can read them.
    """

    config: Config
    files: tuple[Path, ...]
    environment: dict[str, str]


def pack(
    config: Path, overrides: Sequence[str], folder: Path, *, include: Sequence[Path] = (), variables: Sequence[str] = ()
) -> JobPackage:
    """Copy the configuration and the files that it names by relative paths into a folder.

    Args:
        config: the YAML file.
        overrides: as `load_config` takes them.
        folder: an empty directory.
        include: more files or folders, such as modules that a reward function imports.
        variables: names of environment variables of this process that the job gets too.

    Raises:
        ConfigError: the configuration breaks a rule, `run.dir` is relative, a file is not in the current directory or
            does not exist, the files are too large, or a variable is not set or looks like a secret.
    """
    paths = JobPaths(has_working_dir=True)
    loaded = load_config(config, list(overrides), paths)
    files = sorted({file for path in [*paths.inputs, *map(str, include)] for file in _files(path)})
    _check_size(files)
    for file in files:
        copy = folder / file
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(file, copy)
        except PermissionError as error:
            raise ConfigError(
                f"{file}: cannot be read ({error.strerror}), and travels with the job; allow it"
            ) from error
    (folder / CONFIG).write_text(dump_config(loaded))
    return JobPackage(loaded, tuple(files), _environment(loaded, variables))


def _files(path: str) -> Iterator[Path]:
    """Yield all files that a relative path or pattern stands for."""
    found = glob.glob(path, recursive=True) if glob.has_magic(path) and not Path(path).exists() else [path]
    if not found or not all(Path(match).exists() for match in found):
        raise ConfigError(f"{path}: does not exist in {Path.cwd()}; correct the path")
    for match in map(Path, found):
        if match.is_absolute() or ".." in match.parts:
            raise ConfigError(
                f"{path}: only what is in the current directory ({Path.cwd()}) travels with a job; start in a "
                "directory that holds all files, or give a path that is absolute on the cluster"
            )
        if match == Path(CONFIG):
            raise ConfigError(f"{path}: the job's configuration gets this name; rename the file")
        if match.is_dir():
            yield from _inside(match)
        else:
            yield _regular(match)


def _inside(folder: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Yield all files in a folder. Links are followed: a model of the hub's cache is a folder of links."""
    real = folder.resolve()
    if real in above:
        raise ConfigError(f"{folder}: is a link to a folder that it is in, so it has no end; remove the link")
    for child in sorted(folder.iterdir()):
        if child.is_dir():
            yield from _inside(child, above | {real})
        else:
            yield _regular(child)


def _regular(file: Path) -> Path:
    if not file.is_file():
        kind = "a link to nothing" if file.is_symlink() else "neither a file nor a folder"
        raise ConfigError(f"{file}: is {kind}, and cannot travel with a job; remove it, or name single files")
    return file


def _check_size(files: Sequence[Path]) -> None:
    sizes = {file: file.stat().st_size for file in files}
    total = sum(sizes.values())
    if total > _MAX_BYTES:
        largest = max(files, key=lambda file: sizes[file])
        raise ConfigError(
            f"{len(files)} local files of {total / 2**20:.0f} MiB are too much to travel with a job (at most "
            f"{_MAX_BYTES // 2**20} MiB; the largest is {largest}, {sizes[largest] / 2**20:.0f} MiB): put large files "
            "on storage that all nodes share, and give their absolute paths"
        )


def _environment(config: Config, variables: Sequence[str]) -> dict[str, str]:
    # Ray kills a job that it was told to stop after 3 s otherwise
    stop_wait_s = math.ceil(config.checkpoint.grace_s) + _AFTER_CHECKPOINT_S
    return {"RAY_JOB_STOP_WAIT_TIME_S": str(stop_wait_s), **{name: _value_of(name) for name in variables}}


def _value_of(name: str) -> str:
    value = os.environ.get(name)
    if value is None:
        raise ConfigError(f"--env {name}: is not set here; set it, or leave the option out")
    if SECRET_NAME.search(name) or without_secrets(value) != value:
        raise ConfigError(
            f"--env {name}: looks like a secret, and everyone who may use the cluster can read the variables of its "
            "jobs; set it on the cluster's nodes instead (Kubernetes: a Secret in the pods' env)"
        )
    return value
