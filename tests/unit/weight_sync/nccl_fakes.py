"""NCCL on CPU tensors, with faults, below vLLM's own transfer engines; and a learner of two ranks that uses it.

As in NCCL, a broadcast of the sender only enqueues, and the wait for its stream is what gets stuck.
"""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.exceptions import RayTaskError
from torch import Tensor, nn

from quatro_ray.engines.generation import GenerationEngine
from quatro_ray.weight_sync.sender import WeightSender
from quatro_ray.weight_sync.zero_source import ZeroWeightSource
from tests.make import config as make_config

PATIENCE_S = 60.0
"""For what must happen; a test that waits so long fails."""
_stream = threading.local()


class Stream:
    """Runs what was enqueued when somebody waits for it."""

    def __init__(self) -> None:
        self._queue: list[Callable[[], None]] = []

    def enqueue(self, work: Callable[[], None]) -> None:
        self._queue.append(work)

    def synchronize(self) -> None:
        while self._queue:
            self._queue.pop(0)()


@contextmanager
def on_stream(stream: Stream) -> Iterator[None]:
    _stream.current = stream
    try:
        yield
    finally:
        _stream.current = None


@dataclass
class Fault:
    """What the next worker meets, once.

    Attributes:
        phase: "store" before it joins the store, "join" before it joins NCCL, or the number of its broadcast.
        dies: its engine's call fails; else it hangs.
    """

    phase: str | int
    dies: bool


@dataclass
class Nccl:
    """The library, with everything that was made in it."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    ends: bool = False
    """Of the test: whatever is stuck is freed."""
    fault: Fault | None = None
    made: list[Communicator] = field(default_factory=list)
    was_misused: bool = False
    """A communicator was used after it was freed."""

    def wait_until(self, met: Callable[[], bool]) -> None:
        with self.changed:
            self.changed.wait_for(lambda: met() or self.ends)
            if self.ends and not met():
                raise RuntimeError("the test has ended")

    def tell(self) -> None:
        with self.changed:
            self.changed.notify_all()

    def meet_fault(self, phase: str | int) -> None:
        if self.fault is None or self.fault.phase != phase:
            return
        dies, self.fault = self.fault.dies, None
        if dies:
            raise RuntimeError("the engine died")
        self.wait_until(lambda: False)

    def living(self, *, sender: bool) -> list[Communicator]:
        return [c for c in self.made if not c.num_destroyed and (c.rank == 0) == sender]


class Communicator:
    """In the place of vLLM's PyNcclCommunicator."""

    nccl: Nccl
    groups: dict[str, list[Communicator]]

    def __init__(self, group: Any, device: Any) -> None:
        self.rank, self.world_size = group.rank, group.world_size
        self.num_destroyed = 0
        self.sent: list[Tensor] = []
        self.num_enqueued = self.num_received = 0
        if self.rank:
            self.nccl.meet_fault("join")
        name = group.broadcast_obj(uuid.uuid4().hex, src=0)
        self._peers = self.groups.setdefault(name, [])
        self._peers.append(self)
        self.nccl.tell()
        self.nccl.wait_until(lambda: len(self._peers) == self.world_size)
        self.nccl.made.append(self)

    def broadcast(self, tensor: Tensor, src: int, stream: Any = None) -> None:
        self.nccl.was_misused |= self.num_destroyed > 0
        (self._send if self.rank == src else self._receive)(tensor)

    def _send(self, tensor: Tensor) -> None:
        self.num_enqueued += 1
        number = self.num_enqueued

        def work() -> None:
            self.sent.append(tensor)
            self.nccl.tell()
            others = [c for c in self._peers if c is not self]
            self.nccl.wait_until(lambda: self.num_destroyed > 0 or all(c.num_received >= number for c in others))

        _stream.current.enqueue(work)

    def _receive(self, tensor: Tensor) -> None:
        self.nccl.meet_fault(self.num_received)
        (sender,) = (c for c in self._peers if c.rank == 0)
        self.nccl.wait_until(lambda: len(sender.sent) > self.num_received)
        tensor.copy_(sender.sent[self.num_received])
        self.num_received += 1
        self.nccl.tell()

    def destroy(self) -> None:
        self.num_destroyed += 1
        self.nccl.tell()


class Model(nn.Module):
    """An engine's model, which only remembers what it loads."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: dict[str, Tensor] = {}

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.loaded |= {name: tensor.clone() for name, tensor in weights}


class Llm:
    """In the place of AsyncLLM: one worker, which refuses what vLLM's refuses. Each call blocks its own thread."""

    def __init__(self, nccl: Nccl) -> None:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

        parallel = SimpleNamespace(data_parallel_index=0, world_size=1, rank=0)
        config: Any = SimpleNamespace(parallel_config=parallel, model_config=None)
        none: Any = None
        self._nccl = nccl
        self._is_updating = False
        self.model = Model()
        self.worker = NCCLWeightTransferEngine(none, config, torch.device("cpu"), self.model)
        self.version = ""

    async def init_weight_transfer_engine(self, request: Any) -> None:
        self._nccl.meet_fault("store")
        self.worker.init_transfer_engine(self.worker.parse_init_info(request.init_info))

    async def shutdown_weight_transfer_engine(self) -> None:
        if self._is_updating:
            raise RuntimeError("Cannot release a trainer connection during a weight update")
        self.worker.shutdown()

    async def start_weight_update(self) -> None:
        self.worker.start_weight_update()
        self._is_updating = True

    async def update_weights(self, request: Any) -> None:
        self.worker.update_weights(request.update_info)

    async def finish_weight_update(self, weight_version: str) -> None:
        self.worker.finish_weight_update()
        self._is_updating, self.version = False, weight_version


def make_engine(nccl: Nccl) -> GenerationEngine:
    engine = GenerationEngine("model", make_config().generator, device="cpu", sync_backend="nccl", seed=0)
    llm: Any = Llm(nccl)
    engine._llm = llm
    return engine


def submit(engine: Any, method: str, *args: Any) -> Future[Any]:
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(asyncio.run(getattr(engine, method)(*args)))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def collect(futures: list[Future[Any]], seconds: float) -> None:
    """Raise as `ray.get` does: at once if a call fails, and at the deadline."""
    done, pending = wait(futures, seconds, return_when=FIRST_EXCEPTION)
    for future in done:
        future.result()
    if pending:
        raise TimeoutError(f"no answer within {seconds:g} s")


class Policy(nn.Module):
    """Four layers of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(300_000, 1, bias=False) for _ in range(4))


class Gather:
    """The gathers of two ranks, each of which needs both."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(2, timeout=PATIENCE_S)
        self.num_layers = [0, 0]

    def source(self, rank: int, policy: nn.Module) -> ZeroWeightSource:
        def convert(layer: dict[str, Tensor]) -> dict[str, Tensor]:
            if not any(tensor.is_meta for tensor in layer.values()):
                self._barrier.wait()
                self.num_layers[rank] += 1
            return layer

        return ZeroWeightSource(dict(policy.named_parameters()), convert)


class _Ref:
    def __init__(self, method: str, future: Future[Any]) -> None:
        self._method, self._future = method, future

    def __await__(self) -> Iterator[Any]:
        return self._value().__await__()

    async def _value(self) -> Any:
        waiting = asyncio.wrap_future(self._future)
        waiting.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody else may look at it
        try:
            return await asyncio.shield(waiting)
        except Exception as error:
            raise RayTaskError(self._method, str(error), error) from error


class Rank:
    """A LearnerActor without Ray: it has one thread for work and one that answers meanwhile."""

    def __init__(self, sender: WeightSender, address: tuple[str, Callable[[], int]]) -> None:
        self.sender = sender
        work, watch = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self.address = self._method(watch, lambda: address[0])
        self.free_port = self._method(watch, address[1])
        self.close_weight_transfer = self._method(watch, sender.close)
        self.open_weight_transfer = self._method(work, sender.open)
        self.send_weights = self._method(work, sender.send)

    @staticmethod
    def _method(thread: ThreadPoolExecutor, call: Callable[..., Any]) -> Any:
        return SimpleNamespace(remote=lambda *args: _Ref("call", thread.submit(call, *args)))


@pytest.fixture
def nccl(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nccl]:
    from vllm.distributed.device_communicators import pynccl
    from vllm.distributed.weight_transfer import packed_tensor

    library = Nccl()
    fake = type("Fake", (Communicator,), {"nccl": library, "groups": {}})
    monkeypatch.setattr(pynccl, "PyNcclCommunicator", fake)
    monkeypatch.setattr(packed_tensor, "_get_streams", lambda device, num: tuple(Stream() for _ in range(num)))
    monkeypatch.setattr(torch.cuda, "stream", on_stream)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    yield library
    with library.changed:
        library.ends = True
        library.changed.notify_all()
    assert not library.was_misused
