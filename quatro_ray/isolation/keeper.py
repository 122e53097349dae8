"""Starts a worker and leaves nothing of it behind: `python -m quatro_ray.isolation.keeper MODULE PARENT`.

PARENT is the number of the process that starts it. When the worker ends, or when this process receives SIGTERM or loses
its parent, it kills all processes that the worker has started. Those in sessions of their own, and those whose parents
have ended, are among them: the kernel makes them children of this process. It then ends as the worker did.
"""

from __future__ import annotations

import os
import resource
import runpy
import signal
import sys
from pathlib import Path
from typing import NoReturn

from quatro_ray.isolation.protocol import die_with_parent, prctl

_PR_SET_CHILD_SUBREAPER = 36
_AWAITED = {signal.SIGTERM, signal.SIGCHLD}


def command(module: str, *options: str) -> list[str]:
    """Return the command line by which this process starts a keeper.

    Args:
        module: name of the module that the worker runs as a program.
        options: of the interpreter.
    """
    return [sys.executable, *options, "-m", "quatro_ray.isolation.keeper", module, str(os.getpid())]


def keep(module: str, parent: int) -> None:
    """Run a module as a program in a child process, and end with it."""
    prctl(_PR_SET_CHILD_SUBREAPER, 1)
    signal.pthread_sigmask(signal.SIG_BLOCK, _AWAITED)
    die_with_parent(signal.SIGTERM, parent)
    keeper = os.getpid()
    worker = os.fork()
    if worker == 0:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _AWAITED)
        die_with_parent(signal.SIGKILL, keeper)
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return
    _close_pipes()
    status = _wait_for(worker)
    _kill_children()
    _end_like(status)


def _close_pipes() -> None:
    """Replace the standard streams, so that their pipes end when the worker ends."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nothing, stream)


def _wait_for(worker: int) -> int:
    """Return the wait status of the worker; that of an end by SIGTERM if this process is told to end."""
    while signal.sigwait(_AWAITED) != signal.SIGTERM:
        ended, status = os.waitpid(-1, os.WNOHANG)
        while ended not in (0, worker):  # orphans that ended by themselves
            ended, status = os.waitpid(-1, os.WNOHANG)
        if ended == worker:
            return status
    ended, status = os.waitpid(worker, os.WNOHANG)
    return status if ended == worker else signal.SIGTERM  # it may have ended by itself just before


def _kill_children() -> None:
    """Kill all children, and the orphans that become children by that, until none is left."""
    while True:
        for child in Path("/proc/self/task", str(os.getpid()), "children").read_text().split():
            os.kill(int(child), signal.SIGKILL)  # a child that has ended keeps its number until the next line
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _end_like(status: int) -> NoReturn:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one that came meanwhile is not what the worker died of
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _AWAITED)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    keep(sys.argv[1], int(sys.argv[2]))
