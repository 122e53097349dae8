"""Opens the trainer's end of the weight transfer, for either back end."""

from __future__ import annotations

from typing import Any, Literal

from quatro_ray.weight_sync.engine_client import EngineClient
from quatro_ray.weight_sync.vllm_plugin import register


def open_transfer(
    backend: Literal["nccl", "gloo"],
    *,
    rank: int,
    master_address: str,
    master_port: int,
    num_workers: int,
    deadline_s: float,
    client: EngineClient,
    source: Any,
) -> Any:
    """Called on every learner rank. Rank 0 meets the workers; the others only join its gathers.

    Args:
        num_workers: engine workers over all engines.

    Returns:
        vLLM's trainer engine, whose `send_weights()` is a collective over the learner ranks.
    """
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    register()
    world_size = 1 + num_workers
    init_info: Any
    if backend == "gloo":
        from quatro_ray.weight_sync.gloo import GlooTrainerInitInfo

        init_info = GlooTrainerInitInfo(master_address, master_port, world_size, deadline_s, rank=rank)
    else:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        init_info = NCCLTrainerInitInfo(master_address, master_port, world_size, rank=rank)
    return WeightTransferTrainerFactory.trainer_init(init_info, client=client, source=source)
