"""A text file that is only appended to, line by line, and survives a full disk and a crash of the machine."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_MAX_WAITING_BYTES = 2**24
_TAIL_BYTES = 2**14


class AppendLog:
    """A file of lines, opened in append mode.

    Several threads may use it. While the disk is full, lines wait in memory; beyond 16 MiB they are dropped and
    counted. If a writer died within a line, that incomplete last line is removed when the file is opened.

    Args:
        path: the file.
        max_bytes: a larger file is renamed to `earlier(path)`, in place of the one there, and a new one begins.
    """

    def __init__(self, path: Path, *, max_bytes: int | None = None) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._waiting = bytearray()
        self._lock = threading.Lock()
        self.num_dropped = 0
        self._file = path.open("ab", buffering=0)
        self._file.truncate(_end_of_last_line(path))

    def write(self, line: str) -> None:
        """Append a line, given without its line end. Raises OSError for any error except a full disk."""
        encoded = line.encode("utf-8", "backslashreplace") + b"\n"
        with self._lock:
            if len(self._waiting) + len(encoded) > _MAX_WAITING_BYTES:
                self.num_dropped += 1
            else:
                self._waiting += encoded
            self._flush()

    @property
    def num_waiting(self) -> int:
        """Lines that wait for space on the disk; part of the first one may be on disk already."""
        return self._waiting.count(b"\n")

    def keep(self, is_kept: Callable[[bytes], bool]) -> None:
        """Delete all lines for which `is_kept` is false.

        Lines before the first deleted one are not written again, so this works on a full disk. Only kept lines after it
        are in memory.
        """
        with self._lock:
            self._keep(is_kept)

    def _keep(self, is_kept: Callable[[bytes], bool]) -> None:
        num_leading, rest, has_deleted = 0, bytearray(), False
        for line in self._lines():
            if not is_kept(line):
                has_deleted = True
            elif has_deleted:
                rest += line
            else:
                num_leading += len(line)
        num_on_disk = self._path.stat().st_size
        self._file.truncate(min(num_leading, num_on_disk))
        self._waiting = self._waiting[: max(0, num_leading - num_on_disk)] + rest
        self._flush()

    def _lines(self) -> Iterator[bytes]:
        """Yield all lines, with those that wait; the last one on disk may be incomplete, and its end may wait."""
        incomplete = b""
        with self._path.open("rb") as file:
            for line in file:
                if line.endswith(b"\n"):
                    yield line
                else:
                    incomplete = line
        yield from (incomplete + self._waiting).splitlines(keepends=True)

    def close(self) -> None:
        """Write the lines that wait, as far as there is space, and close the file."""
        with self._lock:
            self._flush()
            self._file.close()

    def _flush(self) -> None:
        try:
            while self._waiting:
                del self._waiting[: self._file.write(self._waiting)]
            if self._max_bytes is not None and self._file.tell() > self._max_bytes:
                self._begin_anew()
        except OSError as error:
            if error.errno not in _NO_SPACE:
                raise

    def _begin_anew(self) -> None:
        os.replace(self._path, earlier(self._path))
        with self._file:
            self._file = self._path.open("ab", buffering=0)


def earlier(path: Path) -> Path:
    """Return where the lines before those of `path` are: timeline.1.jsonl for timeline.jsonl."""
    return path.with_suffix(f".1{path.suffix}")


def last_lines_of(path: Path) -> Iterator[bytes]:
    """Yield the last lines of a log whose lines are short, the newest first."""
    for file in (path, earlier(path)):
        if file.is_file():
            with file.open("rb") as opened:
                opened.seek(max(0, file.stat().st_size - _TAIL_BYTES))
                yield from reversed(opened.read().splitlines())


def last_lines(path: Path, num: int) -> list[str]:
    """Return the last complete lines of a log, at most `num`, the newest last. No more of the file is read than needed.

    Args:
        path: the file, which may still grow; none has no lines.
        num: at least 1.
    """
    if not path.is_file():
        return []
    data = b""
    with path.open("rb") as file:
        start = file.seek(0, os.SEEK_END)
        while start > 0 and data.count(b"\n") <= num:
            end, start = start, max(0, start - max(_TAIL_BYTES, len(data)))
            file.seek(start)
            data = file.read(end - start) + data
    complete = data[: data.rfind(b"\n") + 1].decode("utf-8", "replace").split("\n")[:-1]
    return complete[-num:]


def _end_of_last_line(path: Path) -> int:
    """Return the number of bytes up to the end of the last complete line."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - _TAIL_BYTES)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
    return 0
