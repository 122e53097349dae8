"""Builds the command line that runs a program in a bubblewrap sandbox.

Inside, the program has an empty environment; /usr, the libraries and the Python installation, read-only; a /tmp of
bounded size; a /proc with its own processes only; no network; an unprivileged user without capabilities that cannot
create namespaces; and limits on every resource that the kernel counts for a process.

If root starts it, bubblewrap still runs as `nobody`, because the kernel's limit on processes does not apply to root,
nor to root's namespaces. `nobody` cannot reach a Python below /root, so root first mounts it where `nobody` can.

The sandbox does not defend against faults of the kernel; the use of all cores until the deadline; or a flood of empty
files in /tmp (each holds about 1 kB of kernel memory until the program ends).
"""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import quatro_ray
from quatro_ray.config.rewards import SandboxLimits
from quatro_ray.errors import SandboxError
from quatro_ray.isolation.seccomp import seccomp_filter
from quatro_ray.isolation.worker_pool import Launch

FILES = "/box"
"""The read-only folder of `files` inside the sandbox; the current folder is the writable /tmp."""
_NOBODY = "65534"
_STAGE = "/tmp"
_TMP_MIB = 64
_OPEN_FILES = 64
_STACK_MIB = 8
_NEVER_S = 1e7
_PACKAGES = {"bwrap": "bubblewrap (0.8 or newer)", "prlimit": "util-linux", "setpriv": "util-linux", "env": "coreutils"}


@contextmanager
def sandboxed(
    command: Sequence[str],
    limits: SandboxLimits,
    *,
    read_only: Sequence[Path] = (),
    env: Mapping[str, str] | None = None,
    files: Mapping[str, str] | None = None,
    status_fd: int | None = None,
) -> Iterator[Launch]:
    """Yield the command line of a sandboxed process.

    Start the process inside the `with`, in a session of its own; the descriptors are closed when the `with` ends. The
    process dies with the thread that started it. To end it, kill its process group.

    Args:
        command: absolute path of the program inside the sandbox, and its arguments.
        limits: of each process. wall_s is not enforced here, and memory_mib bounds each process, not their sum.
        read_only: files and folders that are readable inside, at the same path, besides the Python installation.
        env: the whole environment; empty by default.
        files: text of files in /box, by name.
        status_fd: descriptor to which bubblewrap writes its JSON status.

    Raises:
        SandboxError: a program that the sandbox needs is not installed.
    """
    descriptors: list[int] = []
    try:
        descriptors.append(_memory_file(seccomp_filter()))
        options = ["--seccomp", str(descriptors[0])]
        for name, text in (files or {}).items():
            descriptors.append(_memory_file(text.encode("utf-8", "surrogatepass")))
            options += ["--perms", "0444", "--file", str(descriptors[-1]), f"{FILES}/{name}"]
        if status_fd is not None:
            options += ["--json-status-fd", str(status_fd)]
        argv = sandbox_command(command, limits, read_only=read_only, env=env or {}, options=options)
        yield Launch(argv, (*descriptors, *([] if status_fd is None else [status_fd])))
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def in_the_sandbox(
    program: str, memory_mib: int, *, read_only: Sequence[Path] = (), env: Mapping[str, str] | None = None
) -> Callable[[], AbstractContextManager[Launch]]:
    """Return a launcher of workers (isolation/worker_pool.py) that have no network and can only write to a small /tmp.

    Args:
        program: name of a module.
        memory_mib: limit of each process's address space.
        read_only: as for `sandboxed`, besides this package.
        env: environment variables besides PYTHONPATH and OMP_NUM_THREADS.
    """
    package = Path(quatro_ray.__file__).parent
    # a worker handles many items, so the pool limits its time
    limits = SandboxLimits(cpu_s=_NEVER_S, wall_s=_NEVER_S, memory_mib=memory_mib)
    variables = {"PYTHONPATH": str(package.parent), "OMP_NUM_THREADS": "1"} | dict(env or {})
    command = [sys.executable, "-m", program]
    return lambda: sandboxed(command, limits, read_only=[package, *read_only], env=variables)


def sandbox_command(
    command: Sequence[str],
    limits: SandboxLimits,
    *,
    read_only: Sequence[Path],
    env: Mapping[str, str],
    options: Sequence[str],
) -> list[str]:
    """Return the command line; `options`: bubblewrap's options for the descriptors that it inherits."""
    paths = _outermost([*_python_folders(), *read_only])
    staged = [f"{_STAGE}/{i}" if os.geteuid() == 0 else str(path) for i, path in enumerate(paths)]
    binds = [part for source, path in zip(staged, paths, strict=True) for part in ("--ro-bind", source, str(path))]
    variables = [part for name, value in env.items() for part in ("--setenv", name, value)]
    # env -i: bubblewrap's own environment could be read inside, as /proc/1/environ.
    start = [_program("env"), "-i", *(_become_nobody(paths, staged) if os.geteuid() == 0 else [])]
    return [
        *start, _program("bwrap"),
        "--unshare-user", "--disable-userns", "--uid", _NOBODY, "--gid", _NOBODY,
        "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try",
        "--hostname", "sandbox", "--new-session", "--die-with-parent", "--clearenv", *variables,
        "--perms", "1777", "--size", str(_TMP_MIB << 20), "--tmpfs", "/tmp", "--chdir", "/tmp",
        *_system(), *binds,  # after /tmp, because a folder to be mounted may lie in /tmp
        "--proc", "/proc", "--remount-ro", "/proc", "--dev", "/dev", "--remount-ro", "/dev",
        "--dir", FILES, *options,
        "--remount-ro", "/",
        "--", *_limited(limits), *command,
    ]  # fmt: skip


def _become_nobody(paths: Sequence[Path], staged: Sequence[str]) -> list[str]:
    """Return the command that root runs before bubblewrap: it mounts `paths` at `staged`, then becomes `nobody`."""
    binds = [part for path, stage in zip(paths, staged, strict=True) for part in ("--ro-bind", str(path), stage)]
    return [
        _program("bwrap"), "--die-with-parent", "--dev-bind", "/", "/", "--tmpfs", "/tmp", *binds, "--",
        _program("setpriv"), "--reuid", _NOBODY, "--regid", _NOBODY, "--clear-groups", "--no-new-privs",
        "--inh-caps=-all", "--bounding-set=-all",
    ]  # fmt: skip


def _limited(limits: SandboxLimits) -> list[str]:
    """Return the command that sets the limits.

    It runs inside the sandbox, because outside of it the kernel would count all processes of the user.
    """
    file_bytes = limits.output_kib << 10
    return [
        _program("prlimit"), f"--cpu={math.ceil(limits.cpu_s)}", f"--as={limits.memory_mib << 20}",
        f"--nproc={limits.max_processes}", f"--fsize={file_bytes}", f"--nofile={_OPEN_FILES}",
        f"--stack={_STACK_MIB << 20}", "--core=0", "--msgqueue=0", "--memlock=0",
    ]  # fmt: skip


def _system() -> list[str]:
    """Return the options for /usr, the folders that are links into it on most systems, and the needed files of /etc."""
    options = ["--ro-bind", "/usr", "/usr"]
    for path in map(Path, ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")):
        if path.is_symlink():
            options += ["--symlink", str(path.readlink()), str(path)]
        elif path.exists():
            options += ["--ro-bind", str(path), str(path)]
    for name in ("/etc/alternatives", "/etc/ld.so.cache", "/etc/localtime"):
        options += ["--ro-bind-try", name, name]
    return options


def _python_folders() -> list[Path]:
    """Return the folders of this interpreter's virtual environment, and of the installation that it was made from."""
    return [Path(sys.prefix), Path(sys.base_prefix), Path(sys.executable).resolve().parent.parent]


def _outermost(paths: Sequence[Path]) -> list[Path]:
    """Return the paths that lie neither in another one nor in /usr, which is always mounted."""
    unique = sorted({Path(os.path.abspath(path)) for path in paths})
    others = [*unique, Path("/usr")]
    return [path for path in unique if path != Path("/usr") and not any(other in path.parents for other in others)]


def _program(name: str) -> str:
    path = shutil.which(name, path="/usr/bin:/bin:/usr/local/bin")
    if path is None:
        raise SandboxError(f"{name} is not installed: apt install {_PACKAGES[name].split()[0]} ({_PACKAGES[name]})")
    return path


def _memory_file(content: bytes) -> int:
    """Return the descriptor of a file in memory."""
    descriptor = os.memfd_create("sandbox")
    with os.fdopen(os.dup(descriptor), "wb") as file:
        file.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor
