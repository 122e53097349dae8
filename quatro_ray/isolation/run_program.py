"""Runs one program in the sandbox until it ends or meets a limit, and then kills every process that it started."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

from quatro_ray.config.rewards import SandboxLimits
from quatro_ray.errors import SandboxError
from quatro_ray.isolation.bubblewrap import sandboxed

RunOutcome = Literal["ok", "timeout", "output", "memory"]
"""How a run ended: "ok" if the program ended by itself, with whatever return code, else the limit that killed it.

The limits of single processes (cpu_s, memory_mib) show in the return code instead."""

_STDERR_BYTES = 4096
_CHUNK_BYTES = 1 << 16
_CHECK_MEMORY_S = 0.05
_KILL_DEADLINE_S = 10


@dataclass(frozen=True)
class Finished:
    """The result of a run.

    Attributes:
        returncode: 128 + n after signal n; -1 if the program was killed at a limit.
        stdout: at most output_kib.
        stderr_tail: last 4 kB of standard error.
    """

    returncode: int
    stdout: bytes
    stderr_tail: bytes
    outcome: RunOutcome


def run(
    command: Sequence[str],
    limits: SandboxLimits,
    *,
    stdin: bytes = b"",
    files: Mapping[str, str] | None = None,
    read_only: Sequence[Path] = (),
    env: Mapping[str, str] | None = None,
) -> Finished:
    """Run `command` and return within wall_s, plus the time that killing takes. Many threads may call this.

    The kernel bounds the memory of each process by memory_mib. A check every 50 ms bounds their sum, and the buffers of
    sockets count; in between it can exceed memory_mib.

    Args:
        command: absolute path of the program inside the sandbox, and its arguments.
        limits: those of the run; wall_s counts the start of the sandbox.
        stdin: standard input of the program, which need not read it.
        files: text of files in /box, by name.
        read_only: files and folders that are readable inside, at the same path, besides the Python installation.
        env: the whole environment; empty by default.

    Raises:
        SandboxError: the sandbox did not start, or did not die when it was killed.
    """
    deadline = time.monotonic() + limits.wall_s
    status_read, status_write = os.pipe()
    try:
        with sandboxed(command, limits, read_only=read_only, env=env, files=files, status_fd=status_write) as launch:
            process = subprocess.Popen(
                launch.argv,
                pass_fds=launch.pass_fds,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                bufsize=0,
            )
    finally:
        os.close(status_write)
    with _Running(process, status_read, stdin, limits) as running:
        outcome = running.until_end(deadline)
        running.kill()
        running.drain()
    return running.finished(outcome)


class _Running:
    """A sandbox that is running: its input, its output so far, and its process 1, whose death kills all others."""

    def __init__(self, process: subprocess.Popen[bytes], status_fd: int, stdin: bytes, limits: SandboxLimits) -> None:
        assert process.stdin and process.stdout and process.stderr
        self._process = process
        self._limits = limits
        self._pending = memoryview(stdin)
        self._stdin, self._stdout, self._stderr = (s.fileno() for s in (process.stdin, process.stdout, process.stderr))
        self._status = status_fd
        self._output: dict[int, bytearray] = {
            self._stdout: bytearray(),
            self._stderr: bytearray(),
            status_fd: bytearray(),
        }
        self._init: tuple[int, int] | None = None  # process id and pidfd of the sandbox's process 1
        self._has_begun = False
        self._exit_code: int | None = None
        self._selector = selectors.DefaultSelector()
        for fd in self._output:
            self._selector.register(fd, selectors.EVENT_READ)
        os.set_blocking(self._stdin, False)
        self._selector.register(self._stdin, selectors.EVENT_WRITE)

    def __enter__(self) -> _Running:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._selector.close()
        if self._init:
            os.close(self._init[1])
        os.close(self._status)
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream:
                stream.close()

    def until_end(self, deadline: float) -> RunOutcome:
        """Wait until the program ends or meets a limit; processes that it started may still run."""
        check_at = time.monotonic() + _CHECK_MEMORY_S
        while self._exit_code is None and self._status_is_open():
            now = time.monotonic()
            if now >= deadline:
                return "timeout"
            if now >= check_at:
                if self._init and _used_bytes(self._init[0]) > self._limits.memory_mib << 20:
                    return "memory"
                check_at = now + _CHECK_MEMORY_S
            self._step(max(0.0, min(deadline, check_at) - now))
            if len(self._output[self._stdout]) > self._limits.output_kib << 10:
                return "output"
        return "ok"

    def kill(self) -> None:
        """Kill process 1: the kernel then kills the others, and process 1 ends only when they are gone."""
        if self._init is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        else:
            _send_kill(self._init[1])
            with selectors.DefaultSelector() as ended:
                ended.register(self._init[1], selectors.EVENT_READ)
                if not ended.select(_KILL_DEADLINE_S):
                    raise SandboxError(f"process {self._init[0]} of a sandbox did not die within {_KILL_DEADLINE_S} s")
        self._process.wait(_KILL_DEADLINE_S)

    def drain(self) -> None:
        """Read what is left in the pipes: the output from before the kill."""
        end = time.monotonic() + _KILL_DEADLINE_S
        self._close_stdin()
        while self._selector.get_map() and time.monotonic() < end:
            self._step(0.1)

    def finished(self, outcome: RunOutcome) -> Finished:
        """Return the result.

        Raises:
            SandboxError: the program never started.
        """
        if outcome == "ok" and self._exit_code is None:
            said = self._output[self._stderr].decode(errors="replace").strip()
            raise SandboxError(f"the sandbox did not start ({said or 'no message'}): {ADVICE}")
        if not self._has_begun:
            raise SandboxError(
                f"the sandbox did not start within wall_s={self._limits.wall_s:g}: the machine is too busy; raise "
                "wall_s, or run fewer processes on this machine"
            )
        stdout = bytes(self._output[self._stdout])
        if outcome == "ok" and len(stdout) > self._limits.output_kib << 10:
            outcome = "output"
        code = self._exit_code if outcome == "ok" and self._exit_code is not None else -1
        return Finished(code, stdout[: self._limits.output_kib << 10], bytes(self._output[self._stderr]), outcome)

    def _status_is_open(self) -> bool:
        return self._status in self._selector.get_map()

    def _step(self, timeout_s: float) -> None:
        for key, _ in self._selector.select(timeout_s):
            if key.fd == self._stdin:
                self._write()
            else:
                self._read(key.fd)

    def _write(self) -> None:
        try:
            self._pending = self._pending[os.write(self._stdin, self._pending[:_CHUNK_BYTES]) :]
        except BrokenPipeError:  # the program need not read its input
            self._pending = self._pending[:0]
        if not self._pending:
            self._close_stdin()

    def _close_stdin(self) -> None:
        if self._process.stdin and not self._process.stdin.closed:
            self._selector.unregister(self._stdin)
            self._process.stdin.close()

    def _read(self, fd: int) -> None:
        data = os.read(fd, _CHUNK_BYTES)
        if not data:
            self._selector.unregister(fd)
        self._output[fd] += data
        if fd == self._stderr:
            del self._output[fd][:-_STDERR_BYTES]
        elif fd == self._status:
            self._read_status()

    def _read_status(self) -> None:
        *lines, rest = bytes(self._output[self._status]).split(b"\n")
        self._output[self._status] = bytearray(rest)
        for status in map(json.loads, lines):
            if "child-pid" in status:
                self._has_begun = True
                self._init = _open_process(status["child-pid"])
            self._exit_code = status.get("exit-code", self._exit_code)


ADVICE = (
    "run `bwrap --unshare-user --ro-bind / / true` to see why; the machine must allow user namespaces "
    "(sysctl user.max_user_namespaces; on Ubuntu also kernel.apparmor_restrict_unprivileged_userns=0), and a container "
    "needs --security-opt seccomp=unconfined --security-opt systempaths=unconfined, as root also --cap-add SYS_ADMIN"
)


def _open_process(pid: int) -> tuple[int, int] | None:
    try:
        return pid, os.pidfd_open(pid)
    except ProcessLookupError:  # it has ended, and everything in the sandbox with it
        return None


def _send_kill(pidfd: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def _used_bytes(pid: int) -> int:
    """Return the memory of a sandbox whose process 1 has this id, with all that its sockets may hold."""
    try:
        first_line = Path(f"/proc/{pid}/net/sockstat").read_text().partition("\n")[0]  # sockets: used 2
        each = int(Path("/proc/sys/net/core/wmem_default").read_text())
    except (FileNotFoundError, ProcessLookupError):  # the process ended meanwhile
        return 0
    return _memory_bytes(pid) + int(first_line.split()[-1]) * each


def _memory_bytes(pid: int) -> int:
    """Return the memory of a process and its descendants; pages that they share are counted once."""
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
        children = [child for task in tasks for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split()]
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError):  # the process ended meanwhile
        return 0
    own = sum(int(line.split()[1]) << 10 for line in rollup.splitlines() if line.startswith("Pss:"))
    return own + sum(_memory_bytes(int(child)) for child in children)
