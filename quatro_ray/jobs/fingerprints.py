"""Fingerprints of what a run reads, by which a resumed run notices that files have changed or only moved."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

from quatro_ray.config import Config, PretrainedModelConfig
from quatro_ray.data.dataset import Dataset
from quatro_ray.types import Query

_BLOCK_BYTES = 2**20
_MAX_BLOCKS = 64
"""Blocks that are read of a larger file, evenly spaced, because whole checkpoints would take minutes."""


def fingerprints(config: Config, dataset: Dataset) -> dict[str, str]:
    """Return a fingerprint, as hexadecimal text, of each source of data and of the model if it lies in a folder.

    Args:
        config: names the model.
        dataset: the queries as they are used, in their order.
    """
    found = {f"data.train.{name}": _of_queries(queries) for name, queries in dataset.train.items()}
    found |= {f"data.eval.{name}": _of_queries(queries) for name, queries in dataset.held_out.items()}
    if isinstance(config.model, PretrainedModelConfig) and Path(config.model.path).is_dir():
        found["model"] = _of_folder(Path(config.model.path))
    return found


def _of_queries(queries: Iterable[Query]) -> str:
    digest = sha256()
    for query in queries:
        digest.update(json.dumps(asdict(query), sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def _of_folder(folder: Path) -> str:
    """Return the fingerprint of the files directly in a folder, by name, size and content."""
    digest = sha256()
    for file in sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")):
        size = file.stat().st_size
        digest.update(f"{file.name}\n{size}\n".encode())
        with file.open("rb") as opened:
            for start in _starts(size):
                opened.seek(start)
                digest.update(opened.read(_BLOCK_BYTES))
    return digest.hexdigest()


def _starts(size: int) -> list[int]:
    """Return where the blocks begin that are read of a file of this size: all of a small one, with both ends."""
    if size <= _MAX_BLOCKS * _BLOCK_BYTES:
        return list(range(0, size, _BLOCK_BYTES))
    return [i * (size - _BLOCK_BYTES) // (_MAX_BLOCKS - 1) for i in range(_MAX_BLOCKS)]
