"""Adapters are gathered by all ranks, and sent by one to every engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from quatro_ray.weight_sync.engine_client import EngineClient
from quatro_ray.weight_sync.sender import open_transfer

ADAPTER = {"base_model.model.layers.0.q_proj.lora_A.weight": torch.ones(2, 3)}


class Source:
    """Counts how often it was iterated to the end."""

    def __init__(self) -> None:
        self.num_passes = 0

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from ADAPTER.items()
        self.num_passes += 1


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_gathers_and_the_first_one_sends(rank: int) -> None:
    calls: list[tuple[str, str, Any]] = []
    client = EngineClient(
        ["one", "two"],
        submit=lambda engine, method, *args: calls.append((engine, method, *args)),
        wait=lambda futures, seconds: None,
        workers_per_engine=1,
        rendezvous_deadline_s=1,
        transfer_deadline_s=1,
    )
    source: Any = Source()
    transfer = open_transfer(
        "adapter",
        rank=rank,
        master_address="nowhere",
        master_port=0,
        num_workers=2,
        deadline_s=1,
        client=client,
        source=source,
    )
    transfer.send_weights()
    assert source.num_passes == 1
    assert calls == ([(engine, "receive_adapter", ADAPTER) for engine in ("one", "two")] if rank == 0 else [])
