"""A small disk for checkpoints, which can be filled."""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path


class Disk:
    """A tmpfs; needs root.

    Args:
        path: where it is mounted.
        size_bytes: what it holds.
    """

    def __init__(self, path: Path, size_bytes: int) -> None:
        self.path = path.absolute()
        self._size_bytes = size_bytes
        self._filler = self.path / "filler"

    def mount(self) -> None:
        """Mount the disk. Raises OSError if that is not permitted."""
        self.path.mkdir(parents=True, exist_ok=True)
        if self.path.is_mount():  # left by a run that was killed
            self.unmount()
            self.path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={self._size_bytes}", "quatro_chaos", str(self.path)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise OSError(f"{self.path}: {done.stderr.strip()}")

    def fill(self, leave_bytes: int) -> int:
        """Fill the disk except for `leave_bytes`; return the bytes that are free then."""
        free = shutil.disk_usage(self.path).free
        with suppress(OSError), self._filler.open("ab") as file:  # until it is full
            os.posix_fallocate(file.fileno(), 0, max(1, free - leave_bytes))
        return shutil.disk_usage(self.path).free

    def free(self) -> None:
        self._filler.unlink(missing_ok=True)

    def unmount(self) -> None:
        for options in ([], ["--lazy"]):
            if subprocess.run(["umount", *options, str(self.path)], capture_output=True).returncode == 0:
                break
        with suppress(OSError):
            self.path.rmdir()
