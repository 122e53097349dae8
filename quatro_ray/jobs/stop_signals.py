"""SIGINT, SIGTERM and SIGHUP end a run in order, at any time; a SIGINT after that ends the process at once."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn, Self

from quatro_ray.errors import Preempted

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignals:
    """Handles the signals while its `with` block runs.

    During the start, a signal raises Preempted in the main thread. After `call`, it calls a function instead.
    """

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._stop: Callable[[], None] | None = None
        self._before = {number: signal.getsignal(number) for number in _STOPPING}

    def __enter__(self) -> Self:
        self.take()
        return self

    def __exit__(self, kind: object, error: BaseException | None, at: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if isinstance(error, Preempted) and self._received is not None:
            error.number = self._received

    def take(self) -> None:
        """Handle the signals from now on; a library may have installed handlers of its own."""
        for number in self._numbers():
            signal.signal(number, self._handle)

    def _numbers(self) -> Iterator[signal.Signals]:
        """Yield the signals that are handled; nohup has the terminal's end ignored, which stays so."""
        yield from (number for number in _STOPPING if self._before[number] != signal.SIG_IGN)

    @contextmanager
    def in_the_loop(self) -> Iterator[None]:
        """Let the running event loop receive the signals inside the `with` block."""
        loop = asyncio.get_running_loop()
        for number in self._numbers():
            loop.add_signal_handler(number, self._handle, number, None)
        try:
            yield
        finally:
            self._stop = _nothing  # what is left is to clean up
            for number in self._numbers():
                loop.remove_signal_handler(number)
            self.take()

    def call(self, stop: Callable[[], None]) -> None:
        """Call `stop` at the first signal from now on; at once if one was received since the last `call`."""
        self._stop = stop
        if self._received is not None:
            stop()

    def end_the_start(self) -> NoReturn:
        """Raise Preempted for the signal that was received."""
        name = self._received.name if self._received else "a signal"
        raise Preempted(f"received {name} during the start, before training began; run the same command to start again")

    def _handle(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGHUP:
            _let_go_of_the_terminal()
        if self._received is None:
            self._received = signal.Signals(number)
            if self._stop is None:
                self.end_the_start()
            else:
                self._stop()
        elif number == signal.SIGINT:
            _end_at_once()


def _nothing() -> None:
    pass


def _end_at_once() -> None:
    with suppress(OSError):
        os.write(sys.stderr.fileno(), b"ended: received SIGINT again; rerun with run.resume=auto to continue\n")
    os._exit(128 + signal.SIGINT)  # Ray's processes end with this one


def _let_go_of_the_terminal() -> None:
    """Send output nowhere where it went to the terminal: writing to one that is gone raises an error."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(stream).st_mode):
                os.dup2(nothing, stream)
    os.close(nothing)
