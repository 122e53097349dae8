"""Stores rollouts in append-only files beside the ledger: each byte is written once, and has a checksum."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

from quatro_ray.errors import DiskFull, LedgerError
from quatro_ray.files import sync

_MAX_BYTES = 64 * 2**20
"""A segment takes no more rollouts beyond this size. It is deleted as a whole, when none of its rollouts is needed."""
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


@dataclass(frozen=True)
class Location:
    """The place of the rollouts of a group.

    Attributes:
        segment: name of the file.
        start: first byte.
        length: bytes.
        checksum: CRC-32 of the bytes.
    """

    segment: str
    start: int
    length: int
    checksum: int


class Segments:
    """A folder of segments, of which one process writes one.

    Args:
        folder: the folder, which is created if it does not exist; None for one that is deleted in the end.
        writer: a number that no other writer of the folder has; it begins the names of the segments.
    """

    def __init__(self, folder: Path | None, writer: int) -> None:
        self._temporary = None if folder else tempfile.TemporaryDirectory(prefix="quatro_ray-ledger-")
        self._folder = folder or Path(self._temporary.name if self._temporary else "")
        self._writer = writer
        self._number = 0
        self._file: int | None = None  # descriptor of the segment that is written
        self._end = 0
        self._unsynced = False

    def append(self, data: bytes) -> Location:
        """Write the bytes, and return where they are.

        Raises:
            DiskFull: the disk is full; the call may be repeated.
        """
        with self._disk():
            if self._file is None or self._end + len(data) > _MAX_BYTES:
                self._begin()
            start = self._end
            self._write(data, start)
        self._end = start + len(data)
        self._unsynced = True
        return Location(self._name(), start, len(data), crc32(data))

    def _begin(self) -> None:
        """Begin the next segment."""
        self.flush()
        self._folder.mkdir(exist_ok=True)
        self._number += 1
        while (self._folder / self._name()).exists():  # of a ledger that was replaced by an older copy
            self._number += 1
        file = os.open(self._folder / self._name(), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        if self._file is not None:
            os.close(self._file)
        self._file, self._end = file, 0

    def _write(self, data: bytes, start: int) -> None:
        """Write at a fixed position, so that the next call overwrites what a failed one has left."""
        assert self._file is not None
        rest = memoryview(data)
        while rest:
            written = os.pwrite(self._file, rest, start)
            start, rest = start + written, rest[written:]

    def _name(self) -> str:
        return f"{self._writer}-{self._number}"

    def read(self, location: Location) -> bytes:
        """Return the bytes at a location.

        Raises:
            LedgerError: they are not there, or are not those that were written.
        """
        path = f"{self._folder}/{location.segment}"
        try:
            file = os.open(path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise LedgerError(f"{path} is missing") from error
        try:
            data = os.pread(file, location.length, location.start)
        finally:
            os.close(file)
        if len(data) != location.length or crc32(data) != location.checksum:
            raise LedgerError(f"{path} is damaged between the bytes {location.start} and {location.start + len(data)}")
        return data

    def keep(self, segments: Collection[str]) -> None:
        """Delete all segments but these and the one that is written."""
        if self._folder.is_dir():
            for path in self._folder.iterdir():
                if path.name not in segments and path.name != self._name():
                    path.unlink()

    def flush(self) -> None:
        """Write the segments to the disk, so that they survive a crash of the machine.

        Raises:
            DiskFull: the disk is full; the call may be repeated.
        """
        if not self._unsynced or self._file is None:
            return
        with self._disk():
            os.fsync(self._file)
            sync(self._folder)  # the name of a new segment
        self._unsynced = False

    @contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in _FULL:
                raise DiskFull(f"rollouts cannot be written to {self._folder}: {error}") from error
            raise

    def close(self) -> None:
        """Close the segment that is written."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
        if self._temporary is not None:
            self._temporary.cleanup()
