"""Hosts on one machine: each has a network namespace with its own address, its own /dev/shm and its own folders."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.real.nodes import BIN, kill

needs_hosts = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("nsenter") is None,
    reason="network namespaces need root, iproute2 and util-linux",
)


@dataclass
class Host:
    """One machine of the network. `folder` is where Ray keeps its files there."""

    namespace: str
    address: str
    folder: Path

    def run(self, *command: str) -> list[str]:
        """The command line that runs a command there, with a /dev/shm of its own."""
        script = 'mount -t tmpfs -o size=2g tmpfs /dev/shm && exec "$@"'
        return ["ip", "netns", "exec", self.namespace, "unshare", "--mount", "sh", "-c", script, "sh", *command]

    def cut_off(self) -> None:
        self._link("down")

    def reconnect(self) -> None:
        self._link("up")

    def _link(self, state: str) -> None:
        _ip("-n", self.namespace, "link", "set", "eth0", state)


@contextmanager
def network(num_hosts: int, folder: Path) -> Iterator[list[Host]]:
    """Hosts on one bridge; processes that are left on them are killed."""
    name = f"qr{secrets.token_hex(2)}"
    hosts = [Host(f"{name}-{i}", f"10.213.7.{i + 1}", folder / f"host{i}") for i in range(num_hosts)]
    _ip("link", "add", name, "type", "bridge")
    try:
        _ip("link", "set", name, "up")
        for host in hosts:
            host.folder.mkdir()
            _connect(host, name)
        yield hosts
    finally:
        for host in hosts:
            found = subprocess.run(["ip", "netns", "pids", host.namespace], capture_output=True, text=True)
            for pid in found.stdout.split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), 9)
            subprocess.run(["ip", "netns", "delete", host.namespace], check=False)
        _ip("link", "delete", name)


def _connect(host: Host, bridge: str) -> None:
    outside = f"{host.namespace}v"
    _ip("netns", "add", host.namespace)
    _ip("link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", host.namespace)
    _ip("link", "set", outside, "master", bridge, "up")
    _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "eth0")
    for device in ("lo", "eth0"):
        _ip("-n", host.namespace, "link", "set", device, "up")


def _ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True)


@dataclass
class RayHost:
    """A host with a Ray node, as `ray start --block` under a supervisor."""

    host: Host
    options: list[str]
    environment: dict[str, str]
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        log = (self.host.folder / "ray.log").open("ab")
        ray = [str(BIN / "ray"), "start", "--block", f"--node-ip-address={self.host.address}", "--disable-usage-stats"]
        command = self.host.run(*ray, f"--temp-dir={self.host.folder}", *self.options)
        with log:
            self.process = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def kill(self) -> None:
        """All of it at once, as when a machine goes."""
        if self.process is not None:
            kill(self.process)

    def enter(self, *command: str) -> list[str]:
        """The command line that runs a command on this host, with the /dev/shm of its node."""
        assert self.process is not None
        return ["nsenter", "--target", str(self.process.pid), "--mount", "--net", *command]
