"""A fencing token: of two attempts that write into one run directory, the older one stops.

The lock on the directory keeps a second attempt out, if both run on one machine or the storage has locks between
machines. Where it has none, or where a new cluster begins while the old one still ends, the newest attempt wins.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import socket
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, Self, TypeVar

from quatro_ray.errors import ConfigError, TakenOver
from quatro_ray.files import replace_file
from quatro_ray.timeouts import unless_raises

T = TypeVar("T")
_logger = logging.getLogger(__name__)
FILE = "writer.json"
LOOK_EVERY_S = 2.0
"""Seconds between two looks of an attempt at the file."""
WAIT_S = 15.0
"""Seconds that a new attempt leaves an older one on another machine to notice, and to stop writing."""


@dataclass(frozen=True)
class _Writer:
    """Content of the file.

    Attributes:
        number: of the attempt, from 1 on.
        nonce: tells two attempts apart that took the same number at one moment.
        host: name of the machine, for people.
        boot: identifies the running kernel, whose locks keep a second attempt on the same machine out.
        has_ended: the attempt will write nothing more.
    """

    number: int
    nonce: str
    host: str
    boot: str
    has_ended: bool = False


class WriterToken:
    """Proof that this process is the newest writer of a run directory."""

    def __init__(self, path: Path, writer: _Writer) -> None:
        self._path = path
        self._writer = writer

    @classmethod
    def take(cls, run_dir: Path, say: Callable[[str], None], wait_s: float = WAIT_S) -> WriterToken:
        """Become the newest writer. An older attempt on another machine that has not ended is left time to stop.

        Args:
            run_dir: the directory, whose lock this process holds.
            say: shows what is waited for.
            wait_s: seconds to wait for the older attempt.

        Raises:
            ConfigError: the file of an older attempt cannot be understood.
            TakenOver: another attempt came at the same moment.
        """
        path = run_dir / FILE
        older = _read(path)
        number = 1 if older is None else older.number + 1
        token = cls(path, _Writer(number, secrets.token_hex(8), socket.gethostname(), _boot_id()))
        _write(path, token._writer)
        if older is not None and not older.has_ended and older.boot != token._writer.boot:
            say(f"run.dir={run_dir}: attempt {older.number} on {older.host} has not ended; it has {wait_s:g} s to stop")
            time.sleep(wait_s)
        token.check()
        return token

    def check(self) -> None:
        """Raise TakenOver if there is a newer writer."""
        newest = _read(self._path)
        if newest is not None and newest.nonce != self._writer.nonce:
            raise TakenOver(
                f"run.dir={self._path.parent}: attempt {newest.number} on {newest.host} writes here now; attempt "
                f"{self._writer.number} on {self._writer.host} has stopped and writes nothing more"
            )

    async def while_newest(self, work: Coroutine[Any, Any, T]) -> T:
        """Return the result of a coroutine; cancel it and raise TakenOver once there is a newer writer."""
        return await unless_raises(self._is_overtaken(), work)

    async def _is_overtaken(self) -> NoReturn:
        while True:
            with suppress(OSError):  # storage that does not answer for a moment says nothing
                await asyncio.to_thread(self.check)
            await asyncio.sleep(LOOK_EVERY_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Record that this attempt writes nothing more, unless there is a newer one."""
        try:
            self.check()
            _write(self._path, replace(self._writer, has_ended=True))
        except TakenOver:
            pass
        except OSError as error:
            _logger.warning("%s cannot be written (%s): an attempt on another machine will wait", self._path, error)


def other_host(run_dir: Path) -> str | None:
    """Return the name of the machine or pod of an attempt that has not recorded its end; None if that is this one.

    Raises:
        ConfigError: the file of the attempt cannot be understood.
    """
    writer = _read(run_dir / FILE)
    return None if writer is None or writer.has_ended or writer.host == socket.gethostname() else writer.host


def _read(path: Path) -> _Writer | None:
    try:
        return _Writer(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{path}: cannot be understood ({error}); make sure that no run writes here, and remove it"
        ) from error


def _write(path: Path, writer: _Writer) -> None:
    """Replace the file by way of one that no other attempt writes."""
    own = path.with_name(f"{FILE}.{writer.nonce}")
    try:
        replace_file(own, json.dumps(asdict(writer)) + "\n")
        own.replace(path)
    finally:
        own.unlink(missing_ok=True)


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
