"""What every section of the configuration is, and a type that several have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict


class Section(BaseModel):
    """A part of the configuration; a component receives its own part, never the whole."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


AbsolutePath = Annotated[Path, AfterValidator(Path.absolute)]
"""Workers may have another current directory than the one that the path is relative to."""


def model_path(path: str) -> str:
    """A folder by its absolute path; anything else is a name on the hub."""
    return str(Path(path).absolute()) if Path(path).is_dir() else path


ModelPath = Annotated[str, AfterValidator(model_path)]


def _function_path(path: str) -> str:
    module, colon, name = path.rpartition(":")
    if not colon or not module or not name.isidentifier():
        raise ValueError("must have the form module:name or path/to/file.py:name; correct it")
    if not module.endswith(".py"):
        return path
    if not Path(module).is_file():
        raise ValueError(f"there is no file {module}; correct the path")
    return f"{Path(module).absolute()}:{name}"


FunctionPath = Annotated[str, AfterValidator(_function_path)]
"""Of a user's function."""
