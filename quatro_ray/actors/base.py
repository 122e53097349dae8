"""What every actor can tell about the host it runs on, and about itself while it is busy."""

from __future__ import annotations

import socket
import sys
import threading
import traceback
from typing import Any, Self

import psutil
import ray

from quatro_ray.actors.memory import peak_rss_bytes
from quatro_ray.telemetry.logs import log_to_stderr

WATCH = "watch"
WATCHED = {WATCH: 1}
"""For ray.remote: `beat` and `stacks` have a thread of their own, which answers while the actor works."""


class HostMixin:
    """Address, a free port, and memory of the actor's process tree. Its actors have concurrency_groups=WATCHED."""

    def __new__(cls, *_args: Any, **_kwargs: Any) -> Self:
        """Send the process's log messages to Ray's log files; an actor has a process of its own."""
        log_to_stderr()
        return super().__new__(cls)

    def address(self) -> str:
        return ray.util.get_node_ip_address()

    def free_port(self) -> int:
        with socket.socket() as s:
            s.bind(("", 0))
            return int(s.getsockname()[1])

    def peak_rss_bytes(self) -> int:
        return peak_rss_bytes()

    @ray.method(concurrency_group=WATCH)
    def beat(self) -> None:
        """A sign of life."""

    @ray.method(concurrency_group=WATCH)
    def stacks(self) -> str:
        """What every thread is doing."""
        names = {t.ident: t.name for t in threading.enumerate()}
        frames = sys._current_frames().items()
        return "\n".join(f"{names.get(i, i)}:\n{''.join(traceback.format_stack(frame))}" for i, frame in frames)


def interface_of(address: str) -> str | None:
    """The network interface that has this address: gloo must be told, since host names often map to 127.0.0.1."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address == address for a in addresses):
            return name
    return None
