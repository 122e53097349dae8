"""The program that self_test.py runs in the sandbox: tries what is forbidden and prints what worked, as JSON."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import TypedDict

CLONE_NEWUSER = 0x10000000


class Given(TypedDict):
    """The JSON object that self_test.py writes to standard input."""

    canary: str
    port: int
    memory_bytes: int
    max_processes: int
    file_bytes: int


def works(action: Callable[[], object]) -> bool:
    """Return whether the action returns something; None, OSError and MemoryError say that it was refused."""
    try:
        return action() is not None
    except (OSError, MemoryError):
        return False


def read(path: str) -> bytes:
    """Return the content of a file."""
    with open(path, "rb") as file:
        return file.read()


def write(path: str) -> str:
    """Create a file, or empty an existing one, and return its path."""
    with open(path, "wb") as file:
        return file.name


def connect(host: str, port: int) -> socket.socket:
    """Return a TCP connection that is made within 0.3 s."""
    return socket.create_connection((host, port), timeout=0.3)


def foreign_sockets() -> list[int] | None:
    """Return the families of sockets, besides AF_UNIX, that can be made."""
    kinds = (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_SEQPACKET)
    families = [n for n in range(64) if n != socket.AF_UNIX]
    return [n for n in families if any(works(functools.partial(socket.socket, n, kind)) for kind in kinds)] or None


def enlarged_buffer() -> bool:
    """Enlarge the buffer of a socket, or raise OSError."""
    one, _ = socket.socketpair()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    return True


def sent_descriptor() -> int:
    """Send a descriptor through a socket, or raise OSError."""
    one, _ = socket.socketpair()
    return socket.send_fds(one, [b"x"], [0])


def interfaces() -> set[str] | None:
    """Return the network interfaces besides loopback."""
    lines = read("/proc/net/dev").decode().splitlines()[2:]
    return {line.split(":")[0].strip() for line in lines} - {"lo"} or None


def attribute() -> list[str]:
    """Set an extended attribute, and return all of the file, or raise OSError."""
    os.setxattr(write("/tmp/x"), "user.x", b"x")
    return os.listxattr("/tmp/x")


def call(name: str, *arguments: int) -> str:
    """Call a function of the C library and return its name; raise OSError if the result is negative."""
    if ctypes.CDLL(None).__getattr__(name)(*arguments) < 0:
        raise OSError(name)
    return name


def clone_namespace() -> int | None:
    """Fork into a new user namespace; the seccomp filter does not look at the flags of clone."""
    number = {"x86_64": 56, "aarch64": 220}[os.uname().machine]
    child: int = ctypes.CDLL(None, use_errno=True).syscall(number, CLONE_NEWUSER | signal.SIGCHLD, 0, 0, 0, 0)
    if child == 0:
        os._exit(0)
    return child if child > 0 else None


def foreign_variables() -> set[str] | None:
    """Return the environment variables of all visible processes, except those that bubblewrap and Python set."""
    text = b"\0".join(read(f"/proc/{pid}/environ") for pid in os.listdir("/proc") if pid.isdigit())
    return {entry.split(b"=")[0].decode() for entry in text.split(b"\0") if entry} - {"PWD", "LC_CTYPE"} or None


def big_file(num_bytes: int) -> str:
    """Write /tmp/big, one byte larger than `num_bytes`, and return its path."""
    with open("/tmp/big", "wb") as file:
        file.write(bytes(num_bytes + 1))
        return file.name


def status(name: str) -> str:
    """Return the value of a field of /proc/self/status."""
    return next(line.split()[1] for line in read("/proc/self/status").decode().splitlines() if line.startswith(name))


def fork_until_refused(limit: int) -> int:
    """Fork children, each in a session of its own, that outlive this program."""
    for _ in range(limit + 1):
        if os.fork() == 0:
            os.setsid()
            time.sleep(60)
            os._exit(0)
    return limit


def leaks(given: Given) -> list[str]:
    """Return what the sandbox should have refused."""
    outside = ["/x", "/usr/x", "/etc/x", "/box/x", "/dev/x", "/dev/shm/x", "/proc/sys/kernel/shmmax", given["canary"]]
    tried: dict[str, Callable[[], object]] = {}
    tried["the network of this machine can be reached"] = lambda: connect("127.0.0.1", given["port"])
    tried["there are network interfaces"] = interfaces
    tried["files of the user can be read"] = lambda: read(given["canary"])
    for path in outside:
        tried[f"{path} can be written"] = functools.partial(write, path)
    tried["sockets that reach beyond a process can be made"] = foreign_sockets
    tried["buffers of sockets can be enlarged"] = enlarged_buffer
    tried["descriptors can be sent through sockets"] = sent_descriptor
    tried["extended attributes can be set"] = attribute
    tried["files without a name can be made"] = lambda: os.memfd_create("x")
    tried["the environment can be read"] = foreign_variables
    tried["memory is not limited"] = lambda: bytearray(given["memory_bytes"])
    tried["the size of files is not limited"] = lambda: big_file(given["file_bytes"])
    tried["shared memory is not limited"] = lambda: call("shmget", 0, 1 << 20, 0o1600)
    tried["namespaces can be entered"] = lambda: call("unshare", CLONE_NEWUSER)
    tried["namespaces can be made"] = clone_namespace
    tried["the number of processes is not limited"] = lambda: fork_until_refused(given["max_processes"])
    found = [leak for leak, action in tried.items() if works(action)]
    found += ["the program has capabilities"] if int(status("CapEff"), 16) else []
    found += ["the program can gain privileges"] if status("NoNewPrivs") != "1" else []
    return found + (["the program is root"] if os.getuid() == 0 else [])


if __name__ == "__main__":
    print(json.dumps(leaks(json.load(sys.stdin))), flush=True)
