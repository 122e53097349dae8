"""The worker's side of the pipes between a worker process and its parent.

It imports neither torch nor ray, whose memory would make the worker's memory limit meaningless.

A frame is a length (4 bytes, big-endian) and JSON. Frames use the process's original standard input and output; what
the user's code prints goes to standard error. A reply repeats the nonce of the request that it answers, a number that
nobody can guess, so that the parent notices a reply to another request. A copy of the process that a fork has made ends
when it would reply.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

MAX_FRAME_BYTES = 64 * 2**20
Message = dict[str, Any]
"""The JSON object in a frame; its fields are those of the worker's program."""
NONCE_KEY = "nonce"
"""Key of the random number of a request, which its reply repeats."""
_PR_SET_PDEATHSIG = 1


def serve(make_handler: Callable[[Message], Handler]) -> None:
    """Answer requests until the pipe closes. The first frame configures the worker; each later one is a request.

    Args:
        make_handler: makes the function that answers requests, from the first frame. The message of an exception that
            it raises is sent to the parent.
    """
    pipes = _take_pipes()
    die_with_parent(signal.SIGKILL, os.getppid())  # the keeper has made sure that it lives, or bwrap
    hello = pipes.read()
    if hello is None:
        return
    resource.setrlimit(resource.RLIMIT_AS, (hello["memory_bytes"],) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        handler = make_handler(hello)
    except Exception as error:  # the parent raises it as a ConfigError
        pipes.write({"error": f"{error}"})
        return
    pipes.write({"ready": True})
    inherited = _max_rss_bytes()
    for request in pipes.requests():
        reply = _answer(handler, pipes, request)
        peak = _max_rss_bytes()
        pipes.write(reply | {"peak_rss_bytes": peak if peak > inherited else 0})


def _answer(handler: Handler, pipes: Pipes, request: Message) -> Message:
    try:
        return handler(pipes, request)
    except SystemExit as error:
        return {"ended": f"called sys.exit({error.code!r:.80})"}
    except (MemoryError, RecursionError) as error:
        return {"exhausted": type(error).__name__}
    except Exception as error:  # reported as a failure; the parent never turns it into a reward of 0
        return {"error": f"{type(error).__name__}: {error}"[:500]}


class Pipes:
    """The two pipes to and from the parent."""

    def __init__(self, requests: BinaryIO, replies: BinaryIO) -> None:
        self._requests = requests
        self._replies = replies
        self._nonce: int | None = None
        self._owner = os.getpid()

    def read(self) -> Message | None:
        """Return the next message, or None at the end of the stream."""
        head = self._requests.read(4)
        if len(head) < 4:
            return None
        size = int.from_bytes(head, "big")
        body = self._requests.read(size)
        if len(body) < size:
            return None
        message: Message = json.loads(body)
        self._nonce = message.pop(NONCE_KEY)
        return message

    def requests(self) -> Iterator[Message]:
        """Yield messages until the stream ends."""
        while (request := self.read()) is not None:
            yield request

    def write(self, message: Message) -> None:
        """Send a message as one frame, with the nonce of the last message that was read, and flush the pipe."""
        if os.getpid() != self._owner:  # the user's code has forked, and the copy has returned too
            os._exit(1)
        self._replies.write(frame(message | {NONCE_KEY: self._nonce}))
        self._replies.flush()


Handler = Callable[[Pipes, Message], Message]
"""Answers one request; it may exchange further messages through the pipes before it returns the answer."""


def frame(message: Message) -> bytes:
    """Return the bytes of a frame.

    Raises:
        ValueError: the message is longer than MAX_FRAME_BYTES.
    """
    body = json.dumps(message).encode()
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"a frame may have at most {MAX_FRAME_BYTES} bytes, not {len(body)}")
    return len(body).to_bytes(4, "big") + body


def size_of(head: bytes) -> int:
    """Return the length of the JSON in a frame, from its first four bytes; raise ValueError if no frame is so long."""
    size = int.from_bytes(head, "big")
    if size > MAX_FRAME_BYTES:
        raise ValueError(f"a frame may have at most {MAX_FRAME_BYTES} bytes, not {size}")
    return size


def message_of(body: bytes) -> Message:
    """Return the message in the JSON of a frame; raise ValueError if it is none."""
    message = json.loads(body)
    if not isinstance(message, dict):
        raise ValueError("a frame holds a JSON object")
    return message


def _take_pipes() -> Pipes:
    """Move the pipes to other descriptors, so that what the user's code prints or reads cannot get into them."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return Pipes(requests, replies)


def prctl(option: int, value: int) -> None:
    """Set an option of this process by the system call of that name, or raise OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def die_with_parent(number: int, parent: int) -> None:
    """Ask the kernel to send a signal to this process when the thread that started it ends.

    Args:
        number: the signal.
        parent: number of the process that started this one. If that has died before this call, this process ends. (The
            new parent need not be process 1, and in a container process 1 may be the true one.)
    """
    prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        sys.exit(1)


def _max_rss_bytes() -> int:
    """Return the peak resident memory in bytes; it starts at the parent's memory at the fork."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
