"""The learner's connection to engines, which any thread may close, so that no thread stays stuck in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, InvalidStateError
from contextlib import contextmanager, suppress
from threading import Lock, Thread
from typing import TypeVar

T = TypeVar("T")


class Connection:
    """One connection. It is opened and closed once; a failed transfer closes it, and the next try makes another.

    All methods may be called by any thread.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._undo: list[Callable[[], object]] = []
        self._why_closed: str | None = None

    def close(self, why: str) -> None:
        """Release what the connection holds. Only the first call does anything.

        Args:
            why: the message of the error that a freed thread raises.
        """
        with self._lock:
            if self._why_closed is not None:
                return
            self._why_closed = why
            undo, self._undo = self._undo, []
        for release in undo:
            release()

    def on_close(self, release: Callable[[], object]) -> None:
        """Call `release` when the connection is closed, or now if it already is."""
        with self._lock:
            if self._why_closed is None:
                self._undo.append(release)
                return
        release()

    @contextmanager
    def closed_on_failure(self) -> Iterator[None]:
        """Close the connection if the body raises, because a part of a transfer cannot be continued.

        Raises:
            ConnectionAbortedError: the body raised, or the connection is closed already; with the first reason.
        """
        if self._why_closed is not None:
            raise ConnectionAbortedError(self._why_closed)
        try:
            yield
        except Exception as error:
            self.close(str(error))
            raise ConnectionAbortedError(self._why_closed) from error

    def open(self, work: Callable[[], T], discard: Callable[[T], object], deadline_s: float) -> T:
        """Return the result of `work`, which opens the connection in a thread of its own.

        The rendezvous of NCCL cannot be aborted from outside before it is done. If it is stuck, its thread is left
        behind, and ends when the processes that it waits for do.

        Args:
            work: opens the connection.
            discard: releases a result that comes when the connection is closed already.
            deadline_s: for the whole work, seconds; then the connection is closed.

        Raises:
            ConnectionAbortedError: the connection was closed before it was open.
        """
        opened: Future[T] = Future()

        def run() -> None:
            try:
                result = work()
            except BaseException as error:
                with suppress(InvalidStateError):  # nobody waits for it any more
                    opened.set_exception(error)
                return
            try:
                opened.set_result(result)
            except InvalidStateError:
                discard(result)

        self.on_close(opened.cancel)
        # a daemon, because the thread of an executor would keep the process from ending
        Thread(target=run, name="connects to the engines", daemon=True).start()
        with suppress(TimeoutError, CancelledError):
            opened.exception(deadline_s)
        if not opened.done():
            self.close(f"the engines could not be connected within {deadline_s:g} s")
        try:
            return opened.result()
        except CancelledError:
            raise ConnectionAbortedError(self._why_closed) from None
