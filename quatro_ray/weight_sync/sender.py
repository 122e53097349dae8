"""The learner's end of the weight transfer, on each of its ranks, for all back ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from quatro_ray.config import WeightSyncConfig
from quatro_ray.config.weight_sync import NUM_TRANSFER_BUFFERS
from quatro_ray.weight_sync.adapter_transfer import AdapterTransfer
from quatro_ray.weight_sync.connection import Connection
from quatro_ray.weight_sync.engine_client import EngineClient, Submit
from quatro_ray.weight_sync.nccl import AbortableGroup
from quatro_ray.weight_sync.vllm_plugin import register

if TYPE_CHECKING:
    from vllm.distributed.weight_transfer.base import WeightSource

    from quatro_ray.weight_sync.zero_source import ZeroWeightSource


class Transfer(Protocol):
    """vLLM's trainer engine, as far as the learner uses it."""

    def send_weights(self) -> None:
        """Send all weights; a collective over the learner ranks."""

    def shutdown(self) -> None:
        """Leave the group of the workers. A thread that is stuck in it is freed, if the back end can."""


class WeightSender:
    """One learner rank's end of the transfer. It has one connection at a time, which `close` ends from any thread.

    Rank 0 meets the workers and sends to them; the other ranks only take part in its gathers.

    Args:
        rank: that of the learner.
        source: the weights in checkpoint format, or the adapters in peft's.
        submit: starts a call of an engine's method and returns its future.
        wait: collects futures within a number of seconds, or raises. If one fails, it raises at once.
    """

    def __init__(
        self, rank: int, source: ZeroWeightSource, submit: Submit, wait: Callable[[list[Any], float], object]
    ) -> None:
        self._rank = rank
        self._source = source
        self._submit = submit
        self._wait = wait
        self._connection = Connection()
        self._client: EngineClient
        self._transfer: Transfer

    def open(
        self,
        backend: Literal["nccl", "ipc", "gloo", "adapter"],
        engines: Sequence[Any],
        workers_per_engine: int,
        master_address: str,
        master_port: int,
        config: WeightSyncConfig,
    ) -> None:
        """Connect to the workers of all engines; call it on every rank. An earlier connection is closed first.

        Args:
            backend: vLLM's weight transfer back end, that of the engines; gloo is ours. adapter: none of them.
            engines: handles for `submit`, in the order of their workers' ranks.
            workers_per_engine: devices of an engine.
            master_address: host of rank 0, as the workers reach it.
            master_port: a TCP port that is free on that host.
            config: gives deadlines and buffers.

        Raises:
            ConnectionAbortedError: the rendezvous failed, with the first reason.
        """
        self.close("another one takes its place")
        self._connection = connection = Connection()
        self._client = EngineClient(
            engines,
            self._submit,
            self._wait,
            workers_per_engine=workers_per_engine,
            rendezvous_deadline_s=config.rendezvous_deadline_s,
            transfer_deadline_s=config.transfer_deadline_s,
            on_failure=connection.close,
        )
        world_size = 1 + len(engines) * workers_per_engine

        def meet() -> Transfer:
            if backend == "adapter":
                return AdapterTransfer(self._client, self._source, is_sender=self._rank == 0)
            return self._meet(self._init_info(backend, master_address, master_port, world_size, config))

        with connection.closed_on_failure():
            self._transfer = connection.open(meet, lambda late: late.shutdown(), config.rendezvous_deadline_s)
        connection.on_close(self._transfer.shutdown)

    def _meet(self, info: Any) -> Transfer:
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

        register()
        if info.backend == "ipc":
            from quatro_ray.weight_sync.ipc import IpcTransfer

            return IpcTransfer(info, self._client, self._source)
        transfer: Any = WeightTransferTrainerFactory.trainer_init(info, client=self._client, source=self._source)
        if info.backend == "nccl" and info.is_sender:
            transfer.model_update_group = AbortableGroup(transfer.model_update_group)
        made: Transfer = transfer
        return made

    def send(self, version: int) -> None:
        """Send the weights, as `version`, to the connected engines. With gloo they still have to load them.

        After a failure the connection is closed. This rank still takes part in all gathers, so that the ranks stay in
        step.

        Raises:
            ConnectionAbortedError: the transfer failed, with the first reason.
        """
        self._client.begin_update(version)
        with self._source.whole_pass(), self._connection.closed_on_failure():
            self._transfer.send_weights()

    def close(self, why: str) -> None:
        """End the connection from any thread, and with NCCL whatever is stuck in it; does nothing if there is none."""
        self._connection.close(why)

    def _init_info(self, backend: str, address: str, port: int, world_size: int, config: WeightSyncConfig) -> Any:
        """Return vLLM's TrainerInitInfo of the back end, which names the back end too."""
        buffer_bytes = config.buffer_mib << 20
        if backend == "gloo":
            from quatro_ray.weight_sync.gloo import GlooTrainerInitInfo

            return GlooTrainerInitInfo(address, port, world_size, config.rendezvous_deadline_s, rank=self._rank)
        # rank 0 tells the workers how the weights are packed, so that both ends agree
        if backend == "ipc":
            from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

            buffer_bytes = max(buffer_bytes, largest_bytes(self._source))  # this back end splits no tensor
            return IPCTrainerInitInfo(packed=True, packed_buffer_size_bytes=buffer_bytes, rank=self._rank)
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        return NCCLTrainerInitInfo(
            address,
            port,
            world_size,
            packed=True,
            packed_buffer_size_bytes=buffer_bytes,
            packed_num_buffers=NUM_TRANSFER_BUFFERS,
            rank=self._rank,
        )


def largest_bytes(source: WeightSource) -> int:
    """Return the size of the largest tensor of a source, bytes."""
    return max(math.prod(meta.shape) * meta.dtype.itemsize for meta in source.metadata())
