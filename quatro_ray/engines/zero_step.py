"""Moving ZeRO-3's weights back along the last optimiser step, each rank on its own shard."""

from __future__ import annotations

from typing import Any

import torch


class ZeroStep:
    """Remembers the fp32 shards before a step: 4 bytes a parameter, divided over the ranks, where they live."""

    def __init__(self, optimizer: Any) -> None:
        """`optimizer`: DeepSpeed's stage 3 optimizer."""
        self._optimizer = optimizer
        self._start = [shard.detach().clone() for shard in optimizer.fp32_partitioned_groups_flat]
        self._kept = 1.0

    @torch.no_grad()
    def move_to(self, kept: float) -> None:
        """weights = start + kept · (stepped − start). A collective: parameters kept whole are gathered again."""
        optimizer = self._optimizer
        optimizer._partition_all_parameters()  # what a pass has gathered would be stale
        for group, (start, shard) in enumerate(zip(self._start, optimizer.fp32_partitioned_groups_flat, strict=True)):
            shard.data.sub_(start).mul_(kept / self._kept).add_(start)
            # into the shards that the passes read, as the optimiser's own step does
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        self._kept = kept
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        optimizer.invalidate_secondary_tensor()
