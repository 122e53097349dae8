"""Checkpoints on disk: written to a temporary folder, sealed with a checksum of every file, and then renamed."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quatro_ray.config import Config
from quatro_ray.errors import CheckpointError
from quatro_ray.files import sync

MANIFEST = "manifest.json"
LEDGER = "ledger.sqlite"
"""Copy of the ledger's database in a checkpoint, and the name of the ledger itself in `run.dir`."""
_STATE = "state.json"
_COMPLETE = re.compile(r"step_[0-9]+")
_WRITING, _DAMAGED = ".writing", ".damaged"
_CHUNK_BYTES = 2**22

Digests = dict[str, tuple[int, str]]
"""Size in bytes and SHA-256, by file name."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files were checked.

    Attributes:
        step: optimiser step of the learner.
        version: policy version of the learner.
        state: what the controller stored.
    """

    path: Path
    step: int
    version: int
    state: dict[str, Any]


def digest_files(folder: Path, share: int = 0, num_shares: int = 1) -> Digests:
    """Return the digests of every `num_shares`-th file, read back from disk; learner ranks divide the files so.

    Args:
        folder: a checkpoint, complete or still being written; what the controller writes into it is left out.
        share: index of the caller's share, in [0, num_shares).
        num_shares: number of callers that divide the files among them.
    """
    return {p.name: (p.stat().st_size, _sha256(p)) for p in _files(folder)[share::num_shares]}


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_file() and p.name not in (MANIFEST, _STATE, LEDGER))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


class CheckpointStore:
    """The checkpoints of a run, as folders `step_N` in one folder; only one process at a time may write.

    Args:
        keep: number of complete checkpoints to keep.
        pinned: steps of checkpoints that are kept besides.
    """

    def __init__(self, folder: Path, keep: int, pinned: Collection[int] = ()) -> None:
        self._folder = folder
        self._keep = keep
        self._pinned = pinned
        self._newest_bytes = 0
        self._newest: Path | None = None

    def check_space(self) -> None:
        """Raise CheckpointError unless a checkpoint as large as the last one fits on the disk.

        Call it before anything is written: a rank that fails in the middle of a collective takes the learner down.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(self._folder).free <= self._newest_bytes:
            for damaged in self._folder.glob(f"step_*{_DAMAGED}"):  # kept for inspection only; space is more urgent
                shutil.rmtree(damaged)
        check_room(self._folder, self._newest_bytes, "a checkpoint", "free some space, or lower checkpoint.keep")

    def begin(self, step: int) -> Path:
        """Return an empty folder to write into, and delete what unfinished attempts have left."""
        for rest in self._folder.glob(f"step_*{_WRITING}"):
            shutil.rmtree(rest)
        path = self._folder / f"step_{step}{_WRITING}"
        path.mkdir(parents=True)
        return path

    def commit(self, writing: Path, version: int, state: Mapping[str, Any], digests: Digests) -> Checkpoint:
        """Complete the checkpoint by a rename, after which it survives any crash; delete old ones beyond `keep`.

        Args:
            writing: folder that `begin` returned, with all shards in it.
            version: policy version of the learner's weights.
            state: what the controller needs to resume; JSON.
            digests: those of the files as their writers saw them.

        Raises:
            CheckpointError: the disk does not hold what was written.
        """
        try:
            digests = _seal(writing, {"version": version, "step": _step_of(writing), "state": state}, digests)
            damage = _damage(writing, thorough=False)
        except OSError as error:
            raise CheckpointError(f"{writing}: {error}") from error
        if damage:
            raise CheckpointError(f"{writing}: {damage}")
        path = writing.with_name(writing.name.removesuffix(_WRITING))
        replace_folder(writing, path)  # a checkpoint of an abandoned lineage may have that name
        sync(path.parent)
        self._newest_bytes, self._newest = sum(size for size, _ in digests.values()), path
        for old in self._unpinned()[self._keep :]:
            if old != path:
                shutil.rmtree(old)
        return _read(path)

    def newest(self, damaged: Callable[[str], None]) -> Checkpoint | None:
        """Return the newest checkpoint whose files are intact, or None if there has never been one.

        Args:
            damaged: called with a message for each newer checkpoint that is damaged; such a folder is renamed, so
                that it is never loaded.

        Raises:
            CheckpointError: all checkpoints are damaged, or are gone since the last one was written or loaded; or one
                cannot be read, which does not mean that it is damaged: it is not changed.
        """
        for path in self._complete():
            try:
                damage = _damage(path, thorough=True)
                checkpoint = None if damage else _read(path)
            except OSError as error:
                raise CheckpointError(
                    f"{path}: cannot be read ({error}), and may be intact; make it readable, then rerun with "
                    "run.resume=auto"
                ) from error
            if checkpoint is not None:
                self._newest_bytes, self._newest = size_of(path), path
                return checkpoint
            aside = path.with_name(path.name + _DAMAGED)
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            damaged(f"{path}: {damage}; it is now {aside.name}, and is not used")
        if left := self.damaged():
            raise CheckpointError(
                f"{self._folder}: no checkpoint is left but damaged ones ({', '.join(left)}); restore one from a "
                "backup, or begin again from step 0 with run.resume=never and run.overwrite=true"
            )
        if self._newest is not None:
            raise CheckpointError(
                f"{self._folder}: has no checkpoint any more, and {self._newest.name} was there; mount or restore the "
                "folder, then rerun with run.resume=auto"
            )
        return None

    def damaged(self) -> list[str]:
        """Return the names of the checkpoints that were found to be damaged."""
        return sorted(path.name for path in self._folder.glob(f"step_*{_DAMAGED}"))

    def ledger_of(self, step: int) -> Path | None:
        """Return the copy of the ledger in a checkpoint, or None if it has none that is intact."""
        path = self._folder / f"step_{step}"
        try:
            size, digest = json.loads((path / MANIFEST).read_text())["files"][LEDGER]
            intact = (path / LEDGER).stat().st_size == size and _sha256(path / LEDGER) == digest
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return path / LEDGER if intact else None

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints by their names alone, newest first."""
        return [_step_of(path) for path in self._complete()]

    def version_of(self, step: int) -> int | None:
        """Return the policy version of a checkpoint, or None if its state cannot be read."""
        try:
            return _read(self._folder / f"step_{step}").version
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def damage_of(self, step: int, *, thorough: bool) -> str | None:
        """Return what differs between a checkpoint and its manifest, or None, also if it was deleted meanwhile.

        Args:
            step: step of the checkpoint.
            thorough: compare the contents of all files too, not only their sizes.
        """
        path = self._folder / f"step_{step}"
        try:
            damage = _damage(path, thorough=thorough)
        except OSError as error:
            damage = f"cannot be read ({error})"
        return damage if step in self.kept_steps() else None

    def kept_steps(self) -> list[int]:
        """Return the steps of the pinned checkpoints, and of the newest `keep` others, newest first."""
        newest = self._unpinned()[: self._keep]
        return [_step_of(path) for path in self._complete() if path in newest or _step_of(path) in self._pinned]

    def newest_step(self) -> int | None:
        """Return the step of the newest checkpoint by its name alone, or None."""
        return next(iter(self.steps()), None)

    def oldest_version(self) -> int | None:
        """Return the least policy version among the checkpoints that can be read and are not pinned, or None."""
        versions = [_read(path).version for path in self._unpinned() if (path / _STATE).is_file()]
        return min(versions, default=None)

    def _unpinned(self) -> Sequence[Path]:
        return [path for path in self._complete() if _step_of(path) not in self._pinned]

    def _complete(self) -> Sequence[Path]:
        """Return the folders of complete checkpoints, newest first."""
        if not self._folder.is_dir():
            return []
        found = [p for p in self._folder.glob("step_*") if _COMPLETE.fullmatch(p.name)]
        return sorted(found, key=_step_of, reverse=True)


def checkpoint_store(config: Config) -> CheckpointStore:
    """Return the store of a run's checkpoints."""
    pinned = frozenset(step - 1 for step in config.replay.keep_steps)
    return CheckpointStore(config.checkpoint_dir, config.checkpoint.keep, pinned)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_").removesuffix(_WRITING))


def _read(path: Path) -> Checkpoint:
    record = json.loads((path / _STATE).read_text())
    return Checkpoint(path, record["step"], record["version"], record["state"])


def _damage(path: Path, *, thorough: bool) -> str | None:
    """Return what differs from the manifest, or None.

    Args:
        path: folder of the checkpoint.
        thorough: compare contents too, not only sizes.

    Raises:
        OSError: a file is there and cannot be read.
    """
    try:
        listed = json.loads((path / MANIFEST).read_text())["files"]
        files = {name: (int(size), str(digest)) for name, (size, digest) in listed.items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return f"{MANIFEST} is not a manifest"
    if _STATE not in files:
        return f"{MANIFEST} does not list {_STATE}"
    for name, (size, digest) in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if (have := file.stat().st_size) != size:
            return f"{name} has {have:,} bytes instead of {size:,}"
        if thorough and _sha256(file) != digest:
            return f"{name} does not have the checksum that it was written with"
    return None


def _seal(writing: Path, record: Mapping[str, Any], digests: Digests) -> Digests:
    _write(writing / _STATE, record)
    own = [path for path in (writing / _STATE, writing / LEDGER) if path.exists()]
    digests = digests | {path.name: (path.stat().st_size, _sha256(path)) for path in own}
    _write(writing / MANIFEST, {"files": digests})
    for path in writing.iterdir():
        sync(path)
    return digests


def _write(path: Path, value: Mapping[str, object]) -> None:
    path.write_text(json.dumps(value))


def size_of(folder: Path) -> int:
    """Return the bytes of the files in a folder."""
    return sum(p.stat().st_size for p in folder.iterdir())


def check_room(folder: Path, num_bytes: int, what: str, remedy: str) -> None:
    """Raise CheckpointError unless the folder's disk has more than `num_bytes` free.

    Args:
        folder: an existing folder on the disk in question.
        num_bytes: size of what is to be written.
        what: subject of the message, such as "a checkpoint".
        remedy: what the user can do.
    """
    free = shutil.disk_usage(folder).free
    if free <= num_bytes:
        raise CheckpointError(f"{folder}: {free:,} bytes are free and {what} takes {num_bytes:,}: {remedy}")


def replace_folder(writing: Path, path: Path) -> None:
    """Rename `writing` to `path`; at every moment one complete folder exists."""
    aside = path.with_name(path.name + ".old")
    shutil.rmtree(aside, ignore_errors=True)
    if path.exists():
        path.rename(aside)
    writing.rename(path)
    shutil.rmtree(aside, ignore_errors=True)
