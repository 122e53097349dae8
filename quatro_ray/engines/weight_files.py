"""Reads what a model's folder says of its weights without loading them: files that are there, and sizes of tensors."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path

from quatro_ray.errors import ConfigError

_SAFETENSORS = "model.safetensors"
_SINGLE = (_SAFETENSORS, "pytorch_model.bin")
"""The names of a model's only file of weights."""
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
"""The names of the files that list several files of weights."""


def check_weights(folder: Path) -> None:
    """Check that the weights of a model are complete, without loading them.

    Raises:
        ConfigError: there are none; a file that the index lists is missing; or a file is shorter than its header says.
    """
    files = weight_files(folder)
    if not files:
        raise ConfigError(
            f"model.path={folder}: has no weights ({', '.join([*_SINGLE, *_INDICES])}); give the folder that "
            "save_pretrained wrote"
        )
    for file in files:
        if not file.is_file():
            raise ConfigError(f"model.path={folder}: its index lists {file.name}, which is missing; copy it there")
        if file.suffix == ".safetensors":
            _check_length(file)


def weight_files(folder: Path) -> list[Path]:
    """Return the files of weights that a model's folder has or whose names its index lists; empty if there are none."""
    for name in _SINGLE:
        if (folder / name).is_file():
            return [folder / name]
    for name in _INDICES:
        if (folder / name).is_file():
            return [folder / listed for listed in sorted(set(_index(folder / name)))]
    return []


def num_weights(folder: Path) -> int | None:
    """Return the number of weights by the headers of the safetensors files, or None if the folder has no such files."""
    shapes = weight_shapes(folder)
    return None if shapes is None else sum(map(math.prod, shapes.values()))


def weight_shapes(folder: Path) -> dict[str, list[int]] | None:
    """Return the shape of each weight by its name in the safetensors files, or None if the folder has no such files."""
    files = [file for file in weight_files(folder) if file.suffix == ".safetensors" and file.is_file()]
    named = (item for file in files for item in _header(file).items())
    return {name: entry["shape"] for name, entry in named if name != "__metadata__"} if files else None


def _index(path: Path) -> Iterator[str]:
    try:
        yield from json.loads(path.read_text())["weight_map"].values()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"model.path={path.parent}: {path.name} has no readable weight_map ({type(error).__name__}: {error}); "
            "copy the folder again"
        ) from error


def _check_length(file: Path) -> None:
    header = _header(file)
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    wanted, have = 8 + _header_bytes(file) + max(ends, default=0), file.stat().st_size
    if have < wanted:
        raise ConfigError(
            f"model.path={file.parent}: {file.name} has {have:,} bytes, and its header says {wanted:,}; copy it again"
        )


def _header_bytes(file: Path) -> int:
    with file.open("rb") as opened:
        return int(struct.unpack("<Q", opened.read(8))[0])


def _header(file: Path) -> dict[str, dict[str, list[int]]]:
    """Return name, dtype, shape and place of every tensor; the file begins with the length of this JSON text."""
    try:
        length = _header_bytes(file)
        if length > file.stat().st_size:
            raise ValueError(f"a header of {length:,} bytes in a file of {file.stat().st_size:,}")
        with file.open("rb") as opened:
            opened.seek(8)
            header: dict[str, dict[str, list[int]]] = json.loads(opened.read(length))
        return header
    except (OSError, ValueError, struct.error) as error:
        raise ConfigError(
            f"model.path={file.parent}: {file.name} is not a safetensors file ({error}); copy it again"
        ) from error
