"""Moves ZeRO-3's weights back along the last optimiser step, each rank on its own shard."""

from __future__ import annotations

import torch

from quatro_ray.engines.zero_engine import ZeroOptimizer


class ZeroStep:
    """A copy of the fp32 shards before a step, on their own device: 4 bytes per parameter, divided over the ranks."""

    def __init__(self, optimizer: ZeroOptimizer) -> None:
        self._optimizer = optimizer
        self._start = [shard.detach().clone() for shard in optimizer.fp32_partitioned_groups_flat]
        self._kept = 1.0

    @torch.no_grad()
    def move_to(self, kept: float) -> None:
        """Set the weights to start + kept · (stepped − start); a collective.

        Parameters that every rank keeps whole are gathered again.

        Args:
            kept: fraction of the step, in (0, 1].
        """
        optimizer = self._optimizer
        optimizer._partition_all_parameters()  # full parameters left by a forward pass would be stale
        for group, (start, shard) in enumerate(zip(self._start, optimizer.fp32_partitioned_groups_flat, strict=True)):
            shard.data.sub_(start).mul_(kept / self._kept).add_(start)
            # copy into the shards that forward passes read, as the optimiser's own step does
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        self._kept = kept
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        optimizer.invalidate_secondary_tensor()
