"""Opens the trainer's end of the weight transfer, for all back ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol

from quatro_ray.weight_sync.engine_client import EngineClient
from quatro_ray.weight_sync.vllm_plugin import register

if TYPE_CHECKING:
    from vllm.distributed.weight_transfer.base import WeightSource


class Transfer(Protocol):
    """vLLM's trainer engine, as far as the learner uses it."""

    def send_weights(self) -> None:
        """Send all weights; a collective over the learner ranks."""


def open_transfer(
    backend: Literal["nccl", "ipc", "gloo"],
    *,
    rank: int,
    master_address: str,
    master_port: int,
    num_workers: int,
    deadline_s: float,
    client: EngineClient,
    source: WeightSource,
) -> Transfer:
    """Open this learner rank's end; call it on every rank.

    Rank 0 meets the workers at `master_address`; the other ranks only take part in its gathers.

    Args:
        backend: vLLM's weight transfer back end, the same as that of the engines; gloo is ours.
        rank: that of the learner.
        master_address: host of rank 0, as the workers reach it.
        master_port: a TCP port that is free on that host.
        num_workers: engine workers over all engines.
        deadline_s: for the rendezvous, and with gloo for each broadcast; ipc has none.
        client: calls the engines.
        source: the weights in checkpoint format.
    """
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    register()
    if backend == "ipc":
        from quatro_ray.weight_sync.ipc import IpcTransfer

        return IpcTransfer(rank, client, source)
    world_size = 1 + num_workers
    init_info: Any
    if backend == "gloo":
        from quatro_ray.weight_sync.gloo import GlooTrainerInitInfo

        init_info = GlooTrainerInitInfo(master_address, master_port, world_size, deadline_s, rank=rank)
    else:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        init_info = NCCLTrainerInitInfo(master_address, master_port, world_size, rank=rank)
    transfer: Transfer = WeightTransferTrainerFactory.trainer_init(init_info, client=client, source=source)
    return transfer
