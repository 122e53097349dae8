"""What every actor can tell about the host it runs on."""

from __future__ import annotations

import socket

import psutil
import ray

from quatro_ray.telemetry.memory import peak_rss_bytes


class HostMixin:
    """Address, a free port, and memory of the actor's process tree."""

    def address(self) -> str:
        return ray.util.get_node_ip_address()

    def free_port(self) -> int:
        with socket.socket() as s:
            s.bind(("", 0))
            return int(s.getsockname()[1])

    def peak_rss_bytes(self) -> int:
        return peak_rss_bytes()


def interface_of(address: str) -> str | None:
    """The network interface that has this address: gloo must be told, since host names often map to 127.0.0.1."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address == address for a in addresses):
            return name
    return None
