"""A temporary folder that the next process deletes if its own was killed."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

_NEW_S = 60.0
"""A younger folder may not be locked yet."""


class TemporaryFolder:
    """A folder in the temporary directory, locked by the process that uses it.

    The lock ends with the process, so it tells whether a folder is in use also where containers share the directory and
    process ids mean nothing.

    Args:
        prefix: begins the folder's name; unlocked folders with this prefix are deleted.

    Attributes:
        path: the folder.
    """

    def __init__(self, prefix: str) -> None:
        for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
            _delete_if_left(folder)
        self._folder = tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True)
        self.path = Path(self._folder.name)
        self._lock = os.open(self.path, os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def close(self) -> None:
        """Delete the folder. May be called again."""
        self._folder.cleanup()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def _delete_if_left(folder: Path) -> None:
    with suppress(OSError):  # it belongs to another user, is in use, or another process was faster
        if time.time() - folder.stat().st_mtime < _NEW_S:
            return
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
        finally:
            os.close(lock)
