"""Pools of worker processes, each killed at its item's deadline, so that every item ends in time."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import NoReturn, TypeVar

from quatro_ray.errors import ConfigError
from quatro_ray.isolation import keeper
from quatro_ray.isolation.protocol import NONCE_KEY, Message, frame, message_of, size_of
from quatro_ray.timeouts import within

T = TypeVar("T")
_REAP_DEADLINE_S = 10.0
_ENDING_S = 2.0
"""How long a process whose pipe has ended may take to end itself, before it is killed."""
_ENDED_FROM_OUTSIDE = {-signal.SIGKILL, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP}
"""Return codes that an item cannot cause in a process that executes none of its text; the machine causes them."""
_PASSED = (
    "PATH", "HOME", "USER", "LOGNAME", "LANG", "LANGUAGE", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR", "LD_LIBRARY_PATH",
    "VIRTUAL_ENV", "CONDA_PREFIX", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "HF_HOME", "HF_HUB_OFFLINE",
    "NLTK_DATA", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CUDA_VISIBLE_DEVICES",
)  # fmt: skip
"""The environment variables that a worker gets, besides those that its configuration names; none holds a secret."""
_RETIRE_ABOVE = 0.5
"""Share of the memory limit above which a worker is replaced after an item: Python does not return memory."""


@dataclass(frozen=True)
class Launch:
    """How a process is started.

    Attributes:
        argv: command line.
        pass_fds: descriptors that it inherits.
        env: the whole environment.
        is_kept: the process is isolation/keeper.py, which SIGTERM tells to kill the worker and all that it started.
    """

    argv: list[str]
    pass_fds: tuple[int, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    is_kept: bool = False


class WorkerLost(Exception):
    """The process ended or never started.

    Attributes:
        by_item: True if the item exceeded its limits, as far as the exit status shows.
        ended_itself: True if the process exited or crashed, which a user's function may have caused.
    """

    def __init__(self, detail: str, *, by_item: bool, ended_itself: bool = False) -> None:
        super().__init__(detail)
        self.by_item = by_item
        self.ended_itself = ended_itself


class Exhausted(Exception):
    """The item exceeded its limits twice, the second time alone in a fresh process.

    Attributes:
        ended_itself: as that of the second WorkerLost.
    """

    def __init__(self, lost: WorkerLost) -> None:
        super().__init__(f"twice: {lost}")
        self.ended_itself = lost.ended_itself


class Worker:
    """One worker process, which handles one item at a time."""

    def __init__(self, process: asyncio.subprocess.Process, *, is_kept: bool) -> None:
        self._process = process
        self._is_kept = is_kept
        self._complaints = bytearray()
        self._listener = asyncio.create_task(self._listen())
        self._exit_status: int | None = None
        self._nonce = 0
        self.num_items = 0
        self.peak_rss_bytes = 0

    @classmethod
    async def start(cls, launch: Launch, hello: Message, deadline_s: float) -> Worker:
        """Start a process and send it its first frame.

        Args:
            launch: its descriptors must stay open until this returns.
            hello: the first frame.
            deadline_s: limit for the start, in seconds.

        Raises:
            ConfigError: the program refuses `hello`.
            WorkerLost: the process does not start.
        """
        process = await asyncio.create_subprocess_exec(
            *launch.argv,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=launch.env,
            pass_fds=launch.pass_fds,
            start_new_session=True,
        )
        worker = cls(process, is_kept=launch.is_kept)
        answer = await worker.ask(hello, deadline_s)
        if "error" in answer:
            await worker.kill()
            raise ConfigError(answer["error"])
        return worker

    async def ask(self, request: Message, deadline_s: float) -> Message:
        """Return the answer to a request. If this raises, the process has been killed.

        Args:
            request: JSON object of at most MAX_FRAME_BYTES bytes, sent as one frame.
            deadline_s: counts from this call.

        Raises:
            WorkerLost: the process missed the deadline, ended, ran out of memory or stack, or answered out of turn.
        """
        try:
            answer = await within(deadline_s, self._exchange(request))
        except TimeoutError:
            await self.kill()
            raise WorkerLost(f"missed its deadline of {deadline_s:g} s", by_item=True) from None
        except (asyncio.IncompleteReadError, ConnectionError):
            code = await self.kill(ending_s=_ENDING_S)
            complaint = bytes(self._complaints).decode(errors="replace").strip().splitlines()
            detail = f"the worker ended with {code}" + (f": {complaint[-1]}" if complaint else "")
            by_item = code not in _ENDED_FROM_OUTSIDE
            raise WorkerLost(detail, by_item=by_item, ended_itself=by_item) from None
        except ValueError:  # the user's code has written to the pipe
            await self._lose("sent what is no reply")
        except BaseException:  # cancelled in the middle of a frame: the pipe is out of step
            await self.kill()
            raise
        if answer.pop(NONCE_KEY, None) != self._nonce:
            await self._lose("answered another request")
        if "ended" in answer:
            await self._lose(answer["ended"], ended_itself=True)
        if "exhausted" in answer:
            await self._lose(answer["exhausted"])
        return answer

    async def _lose(self, detail: str, *, ended_itself: bool = False) -> NoReturn:
        await self.kill()
        raise WorkerLost(detail, by_item=True, ended_itself=ended_itself)

    async def _exchange(self, request: Message) -> Message:
        assert self._process.stdin and self._process.stdout
        self._nonce = secrets.randbits(62)
        self._process.stdin.write(frame(request | {NONCE_KEY: self._nonce}))
        await self._process.stdin.drain()
        answer = message_of(await self._process.stdout.readexactly(size_of(await self._process.stdout.readexactly(4))))
        # 0: no more than the parent had when it forked, so there is no growth to see
        self.peak_rss_bytes = answer.get("peak_rss_bytes", 0)
        return answer

    async def _listen(self) -> None:
        """Keep the end of what the process writes to standard error, and keep the pipe from filling up."""
        assert self._process.stderr
        while data := await self._process.stderr.read(65536):
            self._complaints += data
            del self._complaints[:-2000]

    async def kill(self, ending_s: float = 0.05) -> int:
        """Kill the process and all that it started, and return its exit status, which is negative for a signal.

        Later calls only return the status: the id of a group that was reaped may belong to another one by then.

        Args:
            ending_s: how long a process that is already ending may take, so that its own status is known.
        """
        if self._exit_status is not None:
            return self._exit_status
        with suppress(ProcessLookupError):
            if self._process.stdin:
                self._process.stdin.close()
        exited = self._process.returncode
        if exited is None:
            with suppress(TimeoutError):
                exited = await within(ending_s, self._process.wait())
        code = await self._end()
        self._listener.cancel()
        self._exit_status = exited if exited is not None else code
        return self._exit_status

    async def _end(self) -> int:
        with suppress(ProcessLookupError, PermissionError):
            if self._is_kept:
                os.kill(self._process.pid, signal.SIGTERM)
                with suppress(TimeoutError):
                    return await within(_REAP_DEADLINE_S, self._process.wait())
            os.killpg(self._process.pid, signal.SIGKILL)
        return await within(_REAP_DEADLINE_S, self._process.wait())


def worker_environment(pass_env: Sequence[str] = ()) -> dict[str, str]:
    """Return the environment of a worker outside the sandbox: only what it needs, and the same module path.

    Args:
        pass_env: names of further variables.

    Raises:
        ConfigError: one of them is not set.
    """
    if unset := [name for name in pass_env if name not in os.environ]:
        raise ConfigError(f"pass_env: {unset[0]} is not set on {socket.gethostname()}; set it, or remove the name")
    return {name: os.environ[name] for name in (*_PASSED, *pass_env) if name in os.environ} | {
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }


def in_the_open(program: str, pass_env: Sequence[str] = ()) -> Callable[[], AbstractContextManager[Launch]]:
    """Return a launcher of workers without a sandbox.

    Args:
        program: the name of a module.
        pass_env: names of variables that the workers get besides the common ones.
    """
    return lambda: nullcontext(Launch(keeper.command(program), env=worker_environment(pass_env), is_kept=True))


class ProcessPool:
    """A pool of at most `num_workers` processes.

    An item that exceeds its limits is tried once more, alone in a fresh process. All methods run on one event loop, in
    a thread that outlives the pool: workers die with the thread that started them.

    Args:
        launch: gives the command line of a new process.
        hello: first frame to each process.
        memory_mib: limit of a process's address space.
        recycle_after: number of items after which a worker is replaced.
    """

    def __init__(
        self,
        launch: Callable[[], AbstractContextManager[Launch]],
        hello: Message,
        *,
        num_workers: int,
        memory_mib: int,
        start_deadline_s: float,
        recycle_after: int,
    ) -> None:
        self._launch = launch
        self._memory_bytes = memory_mib * 2**20
        self._hello = hello | {"memory_bytes": self._memory_bytes}
        self._start_deadline_s = start_deadline_s
        self._recycle_after = recycle_after
        self._slots = asyncio.Semaphore(num_workers)
        self._idle: list[Worker] = []
        self.num_replaced = 0

    async def start(self, num: int) -> None:
        """Start `num` processes; the others start when they are needed.

        Raises:
            ConfigError: the program refuses `hello`.
            WorkerLost: a process does not start.
        """
        first = await self._spawn()  # alone, so that an error in the configuration is reported once
        self._idle = [first, *await asyncio.gather(*(self._spawn() for _ in range(num - 1)))]

    async def close(self) -> None:
        """Kill the idle processes, but not those that work on an item."""
        idle, self._idle = self._idle, []
        await asyncio.gather(*(worker.kill() for worker in idle))

    async def _spawn(self) -> Worker:
        try:
            with self._launch() as launch:
                return await Worker.start(launch, self._hello, self._start_deadline_s)
        except (WorkerLost, OSError) as error:
            raise WorkerLost(f"a worker process did not start: {error}", by_item=False) from error

    async def use(self, item: Callable[[Worker], Awaitable[T]]) -> T:
        """Wait for a free process and return what `item` returns for it.

        If the process is lost because of the item, `item` is called once more with a fresh process.

        Args:
            item: must end by itself; it uses deadlines.

        Raises:
            Exhausted: the process was lost twice because of the item.
            WorkerLost: the process was lost through no fault of the item.
            Exception: what `item` raises; the process is killed then.
        """
        async with self._slots:
            try:
                return await self._once(self._idle.pop() if self._idle else await self._spawn(), item)
            except WorkerLost as lost:
                if not lost.by_item:
                    raise
            try:
                return await self._once(await self._spawn(), item)
            except WorkerLost as lost:
                if not lost.by_item:
                    raise
                raise Exhausted(lost) from lost

    async def _once(self, worker: Worker, item: Callable[[Worker], Awaitable[T]]) -> T:
        try:
            result = await item(worker)
        except BaseException as error:
            self.num_replaced += isinstance(error, WorkerLost)
            await worker.kill()
            raise
        worker.num_items += 1
        large = worker.peak_rss_bytes > _RETIRE_ABOVE * self._memory_bytes
        if large or worker.num_items >= self._recycle_after:
            await worker.kill()
        else:
            self._idle.append(worker)
        return result
