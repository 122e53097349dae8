"""Ray nodes as people start them, several on this machine if need be."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@dataclass
class Head:
    """A running Ray head; every client needs its token. `port`: for other nodes."""

    folder: Path
    port: int
    dashboard: str
    environment: dict[str, str]
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def ray(self, *args: str, timeout_s: float = 120, token: bool = True) -> subprocess.CompletedProcess[str]:
        env = self.environment if token else {k: v for k, v in self.environment.items() if k != "RAY_AUTH_TOKEN"}
        command = [str(BIN / "ray"), *args]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout_s, cwd=ROOT)

    def python(self, *args: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *args]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=timeout_s)

    def add_node(self, *options: str) -> subprocess.Popen[bytes]:
        """`ray start --block` with these options; the first one is the head itself."""
        log = self.folder / f"node_{len(self.nodes)}.log"
        # starts jobs, and goes without where another node of this machine has its usual port
        agent = f"--dashboard-agent-listen-port={free_port()}"
        command = [str(BIN / "ray"), "start", "--block", "--node-ip-address=127.0.0.1", agent, *options]
        with log.open("w") as out:
            node = subprocess.Popen(
                command, env=self.environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )
        self.nodes.append(node)
        return node

    def wait_for(self, *command: str, says: str = "", seconds: float = 240) -> None:
        """Until `ray` with this command succeeds, and says so."""
        deadline = time.monotonic() + seconds
        while (tried := self.ray(*command)).returncode or says not in tried.stdout:
            said = [p.read_text() for p in self.folder.glob("node_*.log")] + [tried.stdout, tried.stderr]
            assert self.nodes[0].poll() is None and time.monotonic() < deadline, "\n".join(said)
            time.sleep(1)


def kill(node: subprocess.Popen[bytes]) -> None:
    """Everything that came from it at once, as when a machine goes."""
    with suppress(psutil.NoSuchProcess):
        for process in [*psutil.Process(node.pid).children(recursive=True), psutil.Process(node.pid)]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
    node.wait(timeout=30)


@contextmanager
def ray_head(folder: Path, num_cpus: int, *, is_alone: bool = True) -> Iterator[Head]:
    """`is_alone`: no other node will join, so that it listens on loopback only."""
    # sockets live under this path, and their names may have 107 bytes at most
    temp, port, dashboard = Path(f"/tmp/qr{secrets.token_hex(4)}"), free_port(), free_port()
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0" if is_alone else "1",
        "PATH": f"{BIN}:{os.environ['PATH']}",
        "HOME": str(folder),
    }
    environment.pop("RAY_ADDRESS", None)
    head = Head(folder, port, f"http://127.0.0.1:{dashboard}", environment)
    try:
        head.add_node(
            "--head", f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
            f"--temp-dir={temp}", f"--num-cpus={num_cpus}", "--disable-usage-stats",
        )  # fmt: skip
        # the dashboard answers before the agent that starts jobs is there
        head.wait_for("job", "submit", "--address", head.dashboard, "--no-wait", "--", "true")
        yield head
    finally:
        for node in head.nodes:
            kill(node)
        subprocess.run(["rm", "-rf", str(temp)], check=True)
