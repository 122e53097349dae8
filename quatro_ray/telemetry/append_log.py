"""A text file that is only added to, line by line, and outlives a full disk and a machine that dies."""

from __future__ import annotations

import errno
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_MAX_WAITING_BYTES = 2**24


class AppendLog:
    """Where there is no room, lines wait in memory until there is; beyond 16 MiB they are dropped and counted.

    A last line without its end, of a writer that died, is cut off when the file is opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting = bytearray()
        self.num_dropped = 0
        self._file = path.open("ab", buffering=0)
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            self._file.truncate(content.rfind(b"\n") + 1)

    def write(self, line: str) -> None:
        """`line`: without its end. Raises OSError for anything else than a full disk."""
        encoded = line.encode("utf-8", "backslashreplace") + b"\n"
        if len(self._waiting) + len(encoded) > _MAX_WAITING_BYTES:
            self.num_dropped += 1
        else:
            self._waiting += encoded
        self._flush()

    @property
    def num_waiting(self) -> int:
        """Lines, for room on the disk; one of them may be there in part."""
        return self._waiting.count(b"\n")

    def keep(self, is_kept: Callable[[bytes], bool]) -> None:
        """Only such lines. Those before the first other one are not written again, so that this needs no room."""
        on_disk = self._path.read_bytes()
        lines = (on_disk + self._waiting).splitlines(keepends=True)
        stays = min(sum(map(len, takewhile(is_kept, lines))), len(on_disk))
        self._file.truncate(stays)
        self._waiting = bytearray(b"".join(line for line in lines if is_kept(line))[stays:])
        self._flush()

    def close(self) -> None:
        self._flush()
        self._file.close()

    def _flush(self) -> None:
        try:
            while self._waiting:
                del self._waiting[: self._file.write(self._waiting)]
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
