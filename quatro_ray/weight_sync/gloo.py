"""vLLM weight transfer over gloo, for machines without an accelerator.

It has the life cycle of vLLM's NCCL back end: one rendezvous, then for each update start → receive → finish. A tensor
is sent by one broadcast from rank 0, the trainer.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, ClassVar, Self

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


@dataclass(kw_only=True)
class GlooInitInfo(WeightTransferInitInfo):
    """Arguments for a worker to join; its rank is `rank_offset` plus its number inside the engine."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    timeout_s: float


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """Metadata of one update: one entry per tensor, in the order of the broadcasts."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


@dataclass
class GlooTrainerInitInfo(TrainerInitInfo):
    """Arguments for a trainer rank to join. `world_size`: the sending trainer rank and every engine worker."""

    backend: ClassVar[str] = "gloo"

    master_address: str
    master_port: int
    world_size: int
    timeout_s: float


def _join(address: str, port: int, rank: int, world_size: int, timeout_s: float) -> ProcessGroup:
    group: ProcessGroup = stateless_init_torch_distributed_process_group(
        address, port, rank, world_size, backend="gloo", timeout=timedelta(seconds=timeout_s)
    )
    return group


def _broadcast(group: ProcessGroup, tensor: torch.Tensor) -> None:
    options = BroadcastOptions()
    options.rootRank = 0
    options.rootTensor = 0
    group.broadcast([tensor], options).wait()


def _received(group: ProcessGroup, update_info: GlooUpdateInfo) -> Iterator[tuple[str, torch.Tensor]]:
    for name, dtype, shape in zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True):
        tensor = torch.empty(shape, dtype=getattr(torch, dtype))
        _broadcast(group, tensor)
        yield name, tensor


class GlooWeightTransferEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """Worker side: receives checkpoint-format tensors and loads them layer by layer."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._group: ProcessGroup | None = None

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        """Join the process group; this blocks until the trainer joins, for at most `timeout_s`."""
        parallel = self.parallel_config
        rank = init_info.rank_offset + parallel.data_parallel_index * parallel.world_size + parallel.rank
        self._group = _join(
            init_info.master_address, init_info.master_port, rank, init_info.world_size, init_info.timeout_s
        )

    def start_weight_update(self) -> None:
        """Prepare every layer to load weights in checkpoint format."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)

    def finish_weight_update(self) -> None:
        """Finish the reload of all layers, and pack the weights again that vLLM packs only when it loads a model."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
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

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive one update; overrides the base class, which would synchronise an accelerator."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        """Receive the tensors one by one, while the model loads them.

        The model gets one iterator, as from a checkpoint: each call of `load_weights` looks up all its parameters.

        Args:
            update_info: the tensors, in the order in which the trainer sends them.

        Raises:
            RuntimeError: `init_transfer_engine` was not called.
        """
        if self._group is None:
            raise RuntimeError("init_transfer_engine() must be called before the first update")
        tensors = _received(self._group, update_info)
        self.model.load_weights(tensors)
        for _ in tensors:  # what the model does not ask for is sent too
            pass

    def shutdown(self) -> None:
        """Drop the process group; `init_transfer_engine` may be called again."""
        self._group = None


class GlooTrainerWeightTransferEngine(TrainerWeightTransferEngine[GlooTrainerInitInfo]):
    """Trainer side: every rank iterates the source (a collective); rank 0 also sends and drives the engines."""

    init_info_cls = GlooTrainerInitInfo

    def __init__(
        self, *, client: VLLMWeightSyncClient, source: WeightSource, is_sender: bool, group: ProcessGroup | None
    ) -> None:
        super().__init__(client=client, source=source, is_sender=is_sender)
        self._group = group

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
        if not init_info.is_sender:
            return cls(client=client, source=source, is_sender=False, group=None)
        address, port, world_size = init_info.master_address, init_info.master_port, init_info.world_size
        worker_info = GlooInitInfo(
            master_address=address,
            master_port=port,
            rank_offset=1,
            world_size=world_size,
            timeout_s=init_info.timeout_s,
        )
        # the workers block until rank 0 joins, so the call to them must run beside our own
        with ThreadPoolExecutor(max_workers=1) as executor:
            future = executor.submit(client.init_weight_transfer_engine, asdict(worker_info))
            group = _join(address, port, 0, world_size, init_info.timeout_s)
            future.result(timeout=init_info.timeout_s)
        return cls(client=client, source=source, is_sender=True, group=group)

    def send_weights(self) -> None:
        """Send all weights, and drive the update of the engines; a collective over the trainer ranks."""
        assert self.source is not None
        if not self.is_sender:
            for _ in self.source:
                pass
            return
        assert self._group is not None
        meta = self.source.metadata()
        update = GlooUpdateInfo(
            names=[m.name for m in meta],
            dtype_names=[str(m.dtype).removeprefix("torch.") for m in meta],
            shapes=[list(m.shape) for m in meta],
        )
        self.client.start_weight_update()
        executor = ThreadPoolExecutor(max_workers=1)
        try:
            future = executor.submit(self.client.update_weights, asdict(update))
            for expected, (name, tensor) in zip(meta, self.source, strict=True):
                assert name == expected.name, f"the source yielded {name}, its metadata says {expected.name}"
                _broadcast(self._group, tensor.contiguous())
            future.result()  # without a timeout, because the client's own calls have the deadline
        finally:
            # after a failed broadcast the other side stays blocked; joining its thread would hide the error
            executor.shutdown(wait=False)
        self.client.finish_weight_update()

    def shutdown(self) -> None:
        """Drop the process group."""
        self._group = None
