"""Checkpoints on disk: written beside and renamed, with a checksum of every file, the one before kept until then."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quatro_ray.config import Config
from quatro_ray.errors import CheckpointError

MANIFEST = "manifest.json"
_STATE = "state.json"
_WRITING, _DAMAGED = ".writing", ".damaged"
_CHUNK_BYTES = 2**22

Digests = dict[str, tuple[int, str]]
"""By file name: its size in bytes and its SHA-256."""


@dataclass(frozen=True)
class Checkpoint:
    """One that was checked. `state`: what the controller put in; `step`, `version`: of the learner."""

    path: Path
    step: int
    version: int
    state: dict[str, Any]


def digest_files(folder: Path, share: int = 0, num_shares: int = 1) -> Digests:
    """Of every `num_shares`-th file, read back from the disk: learner ranks divide them."""
    return {p.name: (p.stat().st_size, _sha256(p)) for p in _files(folder)[share::num_shares]}


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_file() and p.name not in (MANIFEST, _STATE))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


class CheckpointStore:
    """`step_N` folders in one folder, of which one process at a time is the writer.

    Args:
        keep: how many complete ones stay.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder = folder
        self._keep = keep
        self._newest_bytes = 0

    def check_space(self) -> None:
        """Raises CheckpointError where there is no room for one as large as the last: before anything is written, for
        ranks that fail in the middle of a collective take the learner with them."""
        self._folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(self._folder).free <= self._newest_bytes:
            for damaged in self._folder.glob(f"step_*{_DAMAGED}"):  # they were kept to be looked at, no longer
                shutil.rmtree(damaged)
        check_room(self._folder, self._newest_bytes, "a checkpoint", "make room, or lower checkpoint.keep")

    def begin(self, step: int) -> Path:
        """An empty folder to write into. What an earlier attempt left half done goes."""
        for rest in self._folder.glob(f"step_*{_WRITING}"):
            shutil.rmtree(rest)
        path = self._folder / f"step_{step}{_WRITING}"
        path.mkdir(parents=True)
        return path

    def commit(self, writing: Path, version: int, state: Mapping[str, Any], digests: Digests) -> Checkpoint:
        """Completes what was written: from the rename on it is there, whatever dies. Then older ones beyond `keep` go.

        Raises:
            CheckpointError: what is on the disk is not what was written.
        """
        try:
            digests = _seal(writing, {"version": version, "step": _step_of(writing), "state": state}, digests)
        except OSError as error:
            raise CheckpointError(f"{writing}: {error}") from error
        if what := _damage(writing, thorough=False):
            raise CheckpointError(f"{writing}: {what}")
        path = writing.with_name(writing.name.removesuffix(_WRITING))
        replace_folder(writing, path)  # there may be one of a line that was abandoned
        _sync(path.parent)
        self._newest_bytes = sum(size for size, _ in digests.values())
        for old in self._complete()[self._keep :]:
            if old != path:
                shutil.rmtree(old)
        return _read(path)

    def newest(self, damaged: Callable[[str], None]) -> Checkpoint | None:
        """The newest whose files are what was written; None where there is none.

        Args:
            damaged: is told of each newer one that is not; those are renamed, so that nobody takes them.
        """
        for path in self._complete():
            if what := _damage(path, thorough=True):
                aside = path.with_name(path.name + _DAMAGED)
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
                damaged(f"{path}: {what}; it is now {aside.name}, and the one before it is used")
                continue
            checkpoint = _read(path)
            self._newest_bytes = size_of(path)
            return checkpoint
        return None

    def newest_step(self) -> int | None:
        """By name alone; None where there is none."""
        return next(map(_step_of, self._complete()), None)

    def oldest_version(self) -> int | None:
        """Of those that are kept, as far as they can be read; None where there is none."""
        versions = [_read(path).version for path in self._complete() if (path / _STATE).is_file()]
        return min(versions, default=None)

    def _complete(self) -> Sequence[Path]:
        """Newest first."""
        if not self._folder.is_dir():
            return []
        found = [p for p in self._folder.glob("step_*") if p.name.removeprefix("step_").isdigit()]
        return sorted(found, key=_step_of, reverse=True)


def checkpoint_store(config: Config) -> CheckpointStore:
    return CheckpointStore(config.checkpoint_dir, config.checkpoint.keep)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_").removesuffix(_WRITING))


def _read(path: Path) -> Checkpoint:
    record = json.loads((path / _STATE).read_text())
    return Checkpoint(path, record["step"], record["version"], record["state"])


def _damage(path: Path, *, thorough: bool) -> str | None:
    """What differs from the manifest; None if nothing does. Thorough: contents too, not only sizes."""
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} cannot be read"
    for name, (size, digest) in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if (have := file.stat().st_size) != size:
            return f"{name} has {have:,} bytes instead of {size:,}"
        if thorough and _sha256(file) != digest:
            return f"{name} has another checksum than when it was written"
    return None


def _seal(writing: Path, record: Mapping[str, Any], digests: Digests) -> Digests:
    _write(writing / _STATE, record)
    digests = digests | {_STATE: ((writing / _STATE).stat().st_size, _sha256(writing / _STATE))}
    _write(writing / MANIFEST, {"files": digests})
    for path in writing.iterdir():
        _sync(path)
    return digests


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def _sync(path: Path) -> None:
    """Onto the disk: a rename that survives a power failure must not outlive the contents."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def size_of(folder: Path) -> int:
    """In bytes, of the files in it."""
    return sum(p.stat().st_size for p in folder.iterdir())


def check_room(folder: Path, num_bytes: int, what: str, remedy: str) -> None:
    """Raises CheckpointError where the disk of the folder has no more room than that."""
    free = shutil.disk_usage(folder).free
    if free <= num_bytes:
        raise CheckpointError(f"{folder}: {free:,} bytes are free and {what} takes {num_bytes:,}: {remedy}")


def replace_folder(writing: Path, path: Path) -> None:
    """`writing` becomes `path`; at every moment one of the two is whole."""
    aside = path.with_name(path.name + ".old")
    shutil.rmtree(aside, ignore_errors=True)
    if path.exists():
        path.rename(aside)
    writing.rename(path)
    shutil.rmtree(aside, ignore_errors=True)
