"""The base of all actors: facts about the host, a sign of life, and stacks while the actor is busy."""

from __future__ import annotations

import os
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
"""The `concurrency_groups` of every actor: its methods have a thread that answers while the actor works."""


class HostMixin:
    """The base class of actors, which are declared with `ray.remote(concurrency_groups=WATCHED)`."""

    def __new__(cls, *_args: Any, **_kwargs: Any) -> Self:
        """Send the log messages of the actor's process to Ray's log files.

        Ray makes an instance where an actor is declared too, in the process that imports it.
        """
        if ray._private.worker.global_worker.mode == ray.WORKER_MODE:
            log_to_stderr()
        return super().__new__(cls)

    @ray.method(concurrency_group=WATCH)
    def address(self) -> str:
        """Return the IP address of the actor's node."""
        return ray.util.get_node_ip_address()

    @ray.method(concurrency_group=WATCH)
    def free_port(self) -> int:
        """Return a TCP port that is free now; it is not reserved."""
        with socket.socket() as s:
            s.bind(("", 0))
            return int(s.getsockname()[1])

    def peak_rss_bytes(self) -> int:
        """Return the peak memory of the actor's process tree, in bytes."""
        return peak_rss_bytes()

    @ray.method(concurrency_group=WATCH)
    def beat(self) -> None:
        """Return at once, as a sign of life."""

    @ray.method(concurrency_group=WATCH)
    def stacks(self) -> str:
        """Return the stack of every thread, under the thread's name."""
        names = {t.ident: t.name for t in threading.enumerate()}
        frames = sys._current_frames().items()
        return "\n".join(f"{names.get(i, i)}:\n{''.join(traceback.format_stack(frame))}" for i, frame in frames)


def use_interface_of(address: str) -> None:
    """Let gloo and NCCL in this process use the network interface with this address, unless their variables are set.

    Gloo would look up the host name, which often maps to 127.0.0.1. NCCL would take the first interface, which may be
    that of a container network that other hosts cannot reach; it uses the interface to find its peers, and for data
    where there is no InfiniBand.
    """
    if interface := interface_of(address):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # =: this name, not all that begin with it


def interface_of(address: str) -> str | None:
    """Return the network interface that has this address, or None."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address == address for a in addresses):
            return name
    return None
