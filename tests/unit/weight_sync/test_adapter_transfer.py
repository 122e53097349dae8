"""Adapters are gathered by all ranks, and sent by one to every engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch

from quatro_ray.config import WeightSyncConfig
from quatro_ray.weight_sync.sender import WeightSender

ADAPTER = {"base_model.model.layers.0.q_proj.lora_A.weight": torch.ones(2, 3)}


class Source:
    """Counts how often it was iterated to the end."""

    def __init__(self) -> None:
        self.num_passes = 0

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from ADAPTER.items()
        self.num_passes += 1

    def whole_pass(self) -> AbstractContextManager[None]:
        return nullcontext()


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_gathers_and_the_first_one_sends(rank: int) -> None:
    calls: list[tuple[str, str, Any]] = []
    source: Any = Source()
    sender = WeightSender(
        rank,
        source,
        submit=lambda engine, method, *args: calls.append((engine, method, *args)),
        wait=lambda futures, seconds: None,
    )
    config = WeightSyncConfig(rendezvous_deadline_s=60, transfer_deadline_s=60)
    sender.open("adapter", ["one", "two"], 1, "nowhere", 0, config)
    sender.send(3)
    assert source.num_passes == 1
    assert calls == ([(engine, "receive_adapter", ADAPTER) for engine in ("one", "two")] if rank == 0 else [])
