"""Resolves relative paths of a configuration, which start in the current directory or a job's working directory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, ValidationInfo

from quatro_ray.config.base import Accepts

_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets this variable for the entrypoint of a submitted job, and for nothing else."""


class Paths:
    """Makes relative paths absolute, because workers may have another current directory."""

    def output(self, path: Path) -> Path:
        """Return where a directory lies that the run writes."""
        return path.absolute()

    def input(self, path: str) -> str:
        """Return where a file, a folder or a pattern of files lies that the run reads."""
        return str(Path(path).absolute())

    def notes(self) -> list[str]:
        """Return lines for the user about paths that lie elsewhere than they may expect."""
        return []


class JobPaths(Paths):
    """Paths of a job, whose processes all start in a copy of its working directory that each node unpacks for itself.

    Relative inputs stay relative, because the copies lie in different places. Relative outputs are refused.

    Attributes:
        inputs: the relative inputs that were met, in their order.
    """

    def __init__(self, *, has_working_dir: bool) -> None:
        self.inputs: list[str] = []
        self._has_working_dir = has_working_dir

    def output(self, path: Path) -> Path:
        """Return the path.

        Raises:
            ValueError: it is relative.
        """
        if not path.is_absolute():
            raise ValueError(
                "is relative; in a job it would lie in a copy of the working directory, which Ray deletes: give an "
                "absolute path on storage that all nodes share"
            )
        return path

    def input(self, path: str) -> str:
        """Return the path unchanged.

        Raises:
            ValueError: it is relative, and the job has no working directory.
        """
        if Path(path).is_absolute():
            return path
        if not self._has_working_dir:
            raise ValueError(
                "is relative, and the job has no working directory: submit it with `quatro-ray submit`, or with "
                "`ray job submit --working-dir`, or give an absolute path"
            )
        self.inputs.append(path)
        return path

    def notes(self) -> list[str]:
        """Return a line for each relative input, with the place that it has on this node."""
        return [f"{path}: {Path(path).absolute()}, in the job's working directory" for path in self.inputs]


def paths_of_this_process() -> Paths:
    """Return the rules for this process: those of a job if it is the entrypoint of one that was submitted to Ray."""
    job = os.environ.get(_JOB)
    if job is None:
        return Paths()
    environment = json.loads(job).get("runtime_env") or {}
    return JobPaths(has_working_dir=bool(environment.get("working_dir")))


def _output(path: Path, info: ValidationInfo) -> Path:
    return _paths(info).output(path)


def _input(path: str, info: ValidationInfo) -> str:
    return _paths(info).input(path)


def folder_or_name(path: str, paths: Paths) -> str:
    """Return where a folder lies, or any other text unchanged, as a name on the hub."""
    return paths.input(path) if Path(path).is_dir() else path


def _folder_or_name(path: str, info: ValidationInfo) -> str:
    return folder_or_name(path, _paths(info))


def _function(path: str, info: ValidationInfo) -> str:
    module, colon, name = path.rpartition(":")
    if not colon or not module or not name.isidentifier():
        raise ValueError("must have the form module:name or path/to/file.py:name; correct it")
    if not module.endswith(".py"):
        return path
    file = _paths(info).input(module)
    if not Path(file).is_file():
        raise ValueError(f"there is no file {module}; correct the path")
    return f"{file}:{name}"


def _paths(info: ValidationInfo) -> Paths:
    return info.context if isinstance(info.context, Paths) else Paths()


OutputPath = Annotated[Path, AfterValidator(_output)]
"""A directory that the run writes."""

InputPath = Annotated[str, AfterValidator(_input)]
"""A file that the run reads, or a pattern of such files."""

FolderOrName = Annotated[str, AfterValidator(_folder_or_name), Accepts("a folder or a name on the hub")]
"""A model or a dataset."""

FunctionPath = Annotated[str, AfterValidator(_function), Accepts("module:name or path/to/file.py:name")]
"""The path of a user's function."""
