"""An NCCL group that can be aborted while it is in use."""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

_ENQUEUE_S = 5.0
"""Seconds within which a call that only enqueues a broadcast ends, unless it is stuck."""


class Communicator(Protocol):
    """vLLM's PyNcclCommunicator, as far as a transfer uses it."""

    def broadcast(self, tensor: Tensor, src: int, stream: Any = None) -> None:
        """Enqueue a broadcast on a stream, by default the current one."""

    def destroy(self) -> None:
        """Abort all communication and free the communicator."""


class AbortableGroup:
    """Lets one thread abort the communicator that another thread sends through.

    The abort ends the broadcasts that are stuck on the device, and with them the wait for their stream, without an
    error. The sender would then take the next broadcast to a communicator that is being freed, or, once vLLM has marked
    it as disabled, skip all that remains in silence. Here every broadcast after the abort raises.
    """

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        self._calling = Lock()
        self._is_aborted = False

    def broadcast(self, tensor: Tensor, src: int, stream: Any = None) -> None:
        """Enqueue a broadcast.

        Raises:
            ConnectionAbortedError: `destroy` was called.
        """
        with self._calling:
            if self._is_aborted:
                raise ConnectionAbortedError("the NCCL group was aborted in the middle of a transfer")
            self._communicator.broadcast(tensor, src=src, stream=stream)

    def destroy(self) -> None:
        """Abort the communicator; call it once."""
        self._is_aborted = True
        # NCCL must not free what another thread's call is using; if that call is stuck, only the abort ends it
        has_left = self._calling.acquire(timeout=_ENQUEUE_S)
        try:
            self._communicator.destroy()
        finally:
            if has_left:
                self._calling.release()
