"""Tests, when a run starts, whether the sandbox holds on this machine."""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import tempfile
from pathlib import Path

from quatro_ray.config.rewards import SandboxLimits
from quatro_ray.errors import SandboxError
from quatro_ray.isolation.run_program import ADVICE, run

_LIMITS = SandboxLimits(cpu_s=2, wall_s=5, memory_mib=128, max_processes=8, output_kib=64)
_PROBE = Path(__file__).with_name("probe.py").read_text(encoding="utf-8")


def self_test() -> None:
    """Run isolation/probe.py in the sandbox, which tries what is forbidden. This takes about half a second.

    Raises:
        SandboxError: the sandbox does not start, or it leaks; the message says what leaks.
    """
    marker = f"quatro-ray-sandbox-{secrets.token_hex(8)}"
    with (
        tempfile.TemporaryDirectory(prefix=".quatro-ray-", dir=_home()) as home,
        socket.create_server(("127.0.0.1", 0)) as server,
    ):
        canary = Path(home) / "canary"
        canary.write_text("canary")
        canary.chmod(0o644)
        given = {
            "canary": str(canary),
            "port": server.getsockname()[1],
            "memory_bytes": _LIMITS.memory_mib << 20,
            "max_processes": _LIMITS.max_processes,
            "file_bytes": _LIMITS.output_kib << 10,
        }
        leaks = _probe(marker, json.dumps(given).encode())
        leaks += (
            []
            if canary.read_text() == "canary" and os.listdir(home) == ["canary"]
            else ["files outside of it can be changed"]
        )
    leaks += ["processes outlive the program"] if _marked(marker) else []
    if leaks:
        raise SandboxError(f"the sandbox leaks on this machine: {'; '.join(leaks)}. Do not run programs here; {ADVICE}")


def _probe(marker: str, given: bytes) -> list[str]:
    ended = run([sys.executable, "-I", "/box/probe.py", marker], _LIMITS, stdin=given, files={"probe.py": _PROBE})
    if ended.outcome != "ok" or ended.returncode != 0:
        said = ended.stderr_tail.decode(errors="replace").strip() or f"return code {ended.returncode}"
        raise SandboxError(
            f"Python does not run in the sandbox ({ended.outcome}: {said}): the installation at {sys.prefix} and "
            f"{sys.base_prefix} must be readable by every user (chmod -R o+rX), or {ADVICE}"
        )
    leaks = json.loads(ended.stdout)
    assert isinstance(leaks, list)
    return leaks


def _home() -> Path:
    """Return the user's home folder, or the folder for temporary files if the home folder is not writable."""
    home = Path.home()
    return home if os.access(home, os.W_OK) else Path(tempfile.gettempdir())


def _marked(marker: str) -> list[str]:
    """Return the ids of the processes that have the marker in their command line."""
    found = []
    for entry in os.listdir("/proc"):
        try:
            if entry.isdigit() and marker.encode() in Path(f"/proc/{entry}/cmdline").read_bytes():
                found.append(entry)
        except (FileNotFoundError, ProcessLookupError):  # the process ended meanwhile
            continue
    return found
