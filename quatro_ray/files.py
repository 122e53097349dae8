"""Writes small files so that a reader, a crash or a full disk never meets half of one."""

from __future__ import annotations

import os
from pathlib import Path


def replace_file(path: Path, text: str) -> None:
    """Write a file in UTF-8 beside its place, sync it, and move it there. If this fails, the old content stays.

    Args:
        path: the file, whose folder exists.
        text: the whole content.

    Raises:
        OSError: the file cannot be written.
    """
    writing = path.with_name(f"{path.name}.writing")
    try:
        with writing.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        writing.replace(path)
    finally:
        writing.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file or folder to the disk: a rename could survive a power failure that the contents do not."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
