"""What a worker's program does at its end of the pipes. Loads neither torch nor ray, so that limits mean something.

Frames are a length (4 bytes, big-endian) and JSON, over the process's first standard input and output; what the
user's code prints goes to standard error.
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
_PR_SET_PDEATHSIG = 1


def serve(make: Callable[[dict[str, Any]], Callable[[Pipes, dict[str, Any]], dict[str, Any]]]) -> None:
    """Runs until the pipe closes: a first frame says what is wanted, each further one is answered.

    Args:
        make: from the first frame to what answers requests. What it raises goes to the parent, as a message.
    """
    pipes = _take_pipes()
    _die_with_parent()
    hello = pipes.read()
    if hello is None:
        return
    resource.setrlimit(resource.RLIMIT_AS, (hello["memory_bytes"],) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        answer = make(hello)
    except Exception as error:  # the parent turns it into a message for the user
        pipes.write({"error": f"{error}"})
        return
    pipes.write({"ready": True})
    inherited = _max_rss_bytes()
    for request in pipes.requests():
        reply = _answered(answer, pipes, request)
        peak = _max_rss_bytes()
        pipes.write(reply | {"peak_rss_bytes": peak if peak > inherited else 0})


def _answered(
    answer: Callable[[Pipes, dict[str, Any]], dict[str, Any]], pipes: Pipes, request: dict[str, Any]
) -> dict[str, Any]:
    try:
        return answer(pipes, request)
    except (MemoryError, RecursionError) as error:
        return {"exhausted": type(error).__name__}
    except Exception as error:  # what fails says so; the parent never makes a 0 of it
        return {"error": f"{type(error).__name__}: {error}"[:500]}


class Pipes:
    """To and from the parent."""

    def __init__(self, requests: BinaryIO, replies: BinaryIO) -> None:
        self._requests = requests
        self._replies = replies

    def read(self) -> Any | None:
        """None at the end of the stream."""
        head = self._requests.read(4)
        if len(head) < 4:
            return None
        size = int.from_bytes(head, "big")
        body = self._requests.read(size)
        return json.loads(body) if len(body) == size else None

    def requests(self) -> Iterator[Any]:
        while (request := self.read()) is not None:
            yield request

    def write(self, value: Any) -> None:
        self._replies.write(frame(value))
        self._replies.flush()


def frame(value: Any) -> bytes:
    """Raises ValueError where it is longer than MAX_FRAME_BYTES."""
    body = json.dumps(value).encode()
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"a frame has {len(body)} bytes, at most {MAX_FRAME_BYTES} are allowed")
    return len(body).to_bytes(4, "big") + body


def _take_pipes() -> Pipes:
    """Under other numbers, so that nothing a user's code prints or reads can get into them."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return Pipes(requests, replies)


def _die_with_parent() -> None:
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1 and os.getpid() != 2:  # the parent died before the call; under bwrap the parent is pid 1
        sys.exit(1)


def _max_rss_bytes() -> int:
    """Counts what the parent had when it forked; what exceeds that is this program's own."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
