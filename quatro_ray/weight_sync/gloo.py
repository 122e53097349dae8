"""vLLM weight transfer over gloo, for machines without an accelerator.

The engines receive while they generate. After one rendezvous, each update has three phases:

1. the workers begin to receive, each in a thread of its own (`update_weights`, which returns at once);
2. rank 0 of the trainer sends all tensors by broadcasts (`send_weights`);
3. while the engine is paused, the workers load what they have received (`finish_weight_update`).

From the second phase to the third each worker holds one more copy of all weights in host memory, in the trainer's dtype
and not divided between the workers of an engine.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import islice
from threading import Thread
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch.distributed import BroadcastOptions, ProcessGroup
from vllm.distributed.utils import stateless_init_torch_distributed_process_group
from vllm.distributed.weight_transfer.base import (
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

T = TypeVar("T")

_BUCKET_BYTES = 16 << 20
"""Most bytes of a broadcast, unless one tensor alone has more: each broadcast wakes every process of the group."""


@dataclass
class Layout:
    """The tensors of an update: one entry for each, in the order of the trainer's source."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]

    @classmethod
    def of(cls, source: WeightSource) -> Self:
        """Return the layout of a source, without gathering anything."""
        meta = source.metadata()
        return cls(
            names=[m.name for m in meta],
            dtype_names=[str(m.dtype).removeprefix("torch.") for m in meta],
            shapes=[list(m.shape) for m in meta],
        )

    def buckets(self) -> Iterator[slice]:
        """Yield the tensors of each broadcast: neighbours of one dtype that fit into _BUCKET_BYTES, or a larger one."""
        first, num_bytes = 0, 0
        for i, (dtype, shape) in enumerate(zip(self.dtype_names, self.shapes, strict=True)):
            size = math.prod(shape) * getattr(torch, dtype).itemsize
            if i > first and (dtype != self.dtype_names[first] or num_bytes + size > _BUCKET_BYTES):
                yield slice(first, i)
                first, num_bytes = i, 0
            num_bytes += size
        if self.names:
            yield slice(first, len(self.names))


@dataclass(kw_only=True)
class GlooInitInfo(WeightTransferInitInfo):
    """Arguments for a worker to join; its rank is `rank_offset` plus its number inside the engine.

    Attributes:
        timeout_s: limit of the rendezvous and of each broadcast, seconds.
        layout: fields of a Layout.
    """

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    timeout_s: float
    layout: dict[str, Any]


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """Has no fields, because all updates of a connection have the same layout."""


@dataclass
class GlooTrainerInitInfo(TrainerInitInfo):
    """Arguments for a trainer rank to join. `world_size`: the sending trainer rank and every engine worker."""

    backend: ClassVar[str] = "gloo"

    master_address: str
    master_port: int
    world_size: int
    timeout_s: float


def _join(address: str, port: int, rank: int, world_size: int, timeout_s: float) -> ProcessGroup:
    """Join the process group. Rank 0 opens its store, and listens on the given address only."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.create_server((address, port), family=family) if rank == 0 else None
    group: ProcessGroup = stateless_init_torch_distributed_process_group(
        address,
        port,
        rank,
        world_size,
        backend="gloo",
        listen_socket=listener,
        timeout=timedelta(seconds=timeout_s),
    )
    return group


def _broadcast(group: ProcessGroup, tensor: torch.Tensor) -> None:
    options = BroadcastOptions()
    options.rootRank = 0
    options.rootTensor = 0
    group.broadcast([tensor], options).wait()


def _send(group: ProcessGroup, layout: Layout, source: WeightSource) -> None:
    """Broadcast all tensors of a source; it holds one bucket beside the tensors that the source gathers."""
    weights = iter(source)
    for bucket in layout.buckets():
        names, tensors = zip(*islice(weights, bucket.stop - bucket.start), strict=True)
        assert list(names) == layout.names[bucket], f"the source yielded {names}, not {layout.names[bucket]}"
        _broadcast(group, torch.cat([tensor.reshape(-1) for tensor in tensors]).cpu())
    assert next(weights, None) is None, "the source yielded more tensors than its metadata has"


def _receive(group: ProcessGroup, layout: Layout) -> list[tuple[str, torch.Tensor]]:
    """Return all tensors by name, as views of the buffers that they came in."""
    received: list[tuple[str, torch.Tensor]] = []
    for bucket in layout.buckets():
        shapes = layout.shapes[bucket]
        sizes = [math.prod(shape) for shape in shapes]
        buffer = torch.empty(sum(sizes), dtype=getattr(torch, layout.dtype_names[bucket.start]), device="cpu")
        _broadcast(group, buffer)
        tensors = (part.view(shape) for part, shape in zip(buffer.split(sizes), shapes, strict=True))
        received.extend(zip(layout.names[bucket], tensors, strict=True))
    return received


def _in_background(work: Callable[[], T]) -> Future[T]:
    """Return the future of `work` in a daemon thread; that of an executor would keep the process from ending."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, name="receives weights", daemon=True).start()
    return future


class GlooWeightTransferEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """Worker side: receives checkpoint-format tensors in the background, and loads them when the update is finished."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._group: ProcessGroup | None = None
        self._layout = Layout([], [], [])
        self._timeout_s = 0.0
        self._received: Future[list[tuple[str, torch.Tensor]]] | None = None

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        """Join the process group; this blocks until the trainer joins, for at most `timeout_s`."""
        parallel = self.parallel_config
        rank = init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        self._group = _join(
            init_info.master_address, init_info.master_port, rank, init_info.world_size, init_info.timeout_s
        )
        self._layout, self._timeout_s = Layout(**init_info.layout), init_info.timeout_s

    def start_weight_update(self) -> None:
        """Do nothing: the model is in use until `finish_weight_update`."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Begin to receive; overrides the base class, which would synchronise an accelerator."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        """Begin to receive, and return at once.

        A transfer that was begun over an earlier connection is forgotten; its thread ends with that connection.

        Raises:
            RuntimeError: `init_transfer_engine` was not called.
        """
        if self._group is None:
            raise RuntimeError("init_transfer_engine() must be called before the first update")
        group, layout = self._group, self._layout
        self._received = _in_background(lambda: _receive(group, layout))

    def finish_weight_update(self) -> None:
        """Load what was received; the caller has paused the engine.

        The model gets one iterator, as from a checkpoint: each call of `load_weights` looks up all its parameters. Then
        the weights are packed again that vLLM packs only when it loads a model.

        Raises:
            RuntimeError: nothing was received.
            TimeoutError: the weights did not arrive within `timeout_s`; the model still has its old weights.
        """
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

        if self._received is None:
            raise RuntimeError("update_weights() must be called before finish_weight_update()")
        weights, self._received = self._received.result(self._timeout_s), None
        initialize_layerwise_reload(self.model)
        self.model.load_weights(iter(weights))
        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            self._repack_tied_heads()
            self._repack_experts()

    def _repack_tied_heads(self) -> None:
        """Pack the weights of tied heads again.

        vLLM's CPU linear layers compute with a packed copy of their weight. A head that shares the embedding's weight
        receives no tensor of its own, so its copy would stay that of the first policy.
        """
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        for layer in self.model.modules():
            if isinstance(layer, ParallelLMHead):
                layer.quant_method.process_weights_after_loading(layer)

    def _repack_experts(self) -> None:
        """Pack the weights of experts again.

        vLLM's CPU kernel of mixtures of experts computes with packed weights, and packs them only when it is made
        (UnquantizedFusedMoEMethod._setup_kernel of vLLM 0.32): after a reload it would read plain weights as packed.
        """
        from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
        from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

        for layer in self.model.modules():
            method = getattr(layer, "quant_method", None)
            if isinstance(layer, RoutedExperts) and isinstance(method, UnquantizedFusedMoEMethod) and method.moe_kernel:
                method.moe_kernel.fused_experts.process_weights_after_loading(layer)

    def shutdown(self) -> None:
        """Drop the process group; `init_transfer_engine` may be called again."""
        self._group = None


class GlooTrainerWeightTransferEngine(TrainerWeightTransferEngine[GlooTrainerInitInfo]):
    """Trainer side: every rank iterates the source (a collective), and rank 0 sends what it yields.

    The caller lets the engines begin to receive before `send_weights`, and lets them load afterwards.
    """

    init_info_cls = GlooTrainerInitInfo

    def __init__(
        self,
        *,
        client: VLLMWeightSyncClient,
        source: WeightSource,
        is_sender: bool,
        group: ProcessGroup | None,
        layout: Layout,
    ) -> None:
        super().__init__(client=client, source=source, is_sender=is_sender)
        self._group = group
        self._layout = layout

    @classmethod
    def trainer_init(
        cls, init_info: GlooTrainerInitInfo, *, client: VLLMWeightSyncClient, source: WeightSource | None = None
    ) -> Self:
        """Return the transfer engine of one trainer rank; on rank 0, meet the engines' workers first.

        Args:
            init_info: address, port and size of the process group, which only rank 0 joins.
            client: calls the engines; only rank 0 uses it.
            source: the weights, over which every rank iterates.

        Raises:
            ValueError: there is no source.
            TimeoutError: the workers did not join within `timeout_s`.
        """
        if source is None:
            raise ValueError("the gloo back end needs a WeightSource to send; pass source=")
        layout = Layout.of(source)
        if not init_info.is_sender:
            return cls(client=client, source=source, is_sender=False, group=None, layout=layout)
        address, port, world_size = init_info.master_address, init_info.master_port, init_info.world_size
        worker_info = GlooInitInfo(
            master_address=address,
            master_port=port,
            rank_offset=1,
            world_size=world_size,
            timeout_s=init_info.timeout_s,
            layout=asdict(layout),
        )
        # the workers block until rank 0 joins, so the call to them must run beside our own
        with ThreadPoolExecutor(max_workers=1) as executor:
            future = executor.submit(client.init_weight_transfer_engine, asdict(worker_info))
            group = _join(address, port, 0, world_size, init_info.timeout_s)
            future.result(timeout=init_info.timeout_s)
        return cls(client=client, source=source, is_sender=True, group=group, layout=layout)

    def send_weights(self) -> None:
        """Send all weights to engines that already receive; a collective over the trainer ranks."""
        assert self.source is not None
        if self._group is not None:
            _send(self._group, self._layout, self.source)
            return
        for _ in self.source:
            pass

    def shutdown(self) -> None:
        """Drop the process group."""
        self._group = None
