"""The part of DeepSpeed's ZeRO-3 engine that the learner uses; DeepSpeed has no types of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor


class ZeroOptimizer(Protocol):
    """DeepSpeed's stage 3 optimizer. Names that begin with an underscore are internal to DeepSpeed 0.19."""

    optimizer: torch.optim.Optimizer
    param_groups: list[dict[str, Any]]
    fp32_partitioned_groups_flat: list[Tensor]
    """This rank's fp32 shard of the weights, one flat tensor per sub-group."""
    persistent_parameters: list[Any]
    """Parameters so small that every rank keeps them whole."""

    def _partition_all_parameters(self) -> None: ...
    def _reassign_or_swap_out_partitioned_parameters(self, sub_group: int) -> None: ...
    def invalidate_secondary_tensor(self) -> None:
        """Discard the secondary copies of the weights (ZeRO++), which a change of the shards makes stale."""
        ...


class ZeroEngine(Protocol):
    """DeepSpeedEngine around an engines/policy.py:PolicyModel."""

    optimizer: ZeroOptimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    _config: Any

    def __call__(
        self, token_ids: Tensor, position_ids: Tensor, target_ids: Tensor, counted: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return log-probs of the targets and entropies, as PolicyModel.forward does; a collective."""
        ...

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Set whether the next backward pass is the last one before the optimiser's step."""
        ...

    def backward(self, loss: Tensor) -> object:
        """Add the loss's gradient to that of earlier micro-batches; a collective."""
        ...

    def step(self) -> None:
        """Take one optimiser step, which all ranks skip if the gradient of any rank is not finite; a collective."""
        ...

    def was_step_applied(self) -> bool:
        """Return whether the last `step` changed the weights."""
        ...

    def get_global_grad_norm(self) -> float | None:
        """Return the 2-norm of the last step's gradient over all ranks, before clipping."""
        ...

    def bfloat16_enabled(self) -> bool:
        """Return whether the model computes in bfloat16."""
        ...

    def save_checkpoint(
        self,
        save_dir: str,
        *,
        tag: str,
        client_state: Mapping[str, Any],
        save_latest: bool,
        exclude_frozen_parameters: bool,
    ) -> object:
        """Write this rank's shards and `client_state` to the folder `tag` in `save_dir`; a collective."""
        ...

    def load_checkpoint(
        self, load_dir: str, *, tag: str, custom_load_fn: Callable[..., None]
    ) -> tuple[str | None, Any]:
        """Load the folder `tag` in `load_dir`; a collective.

        Args:
            load_dir: folder of the checkpoints.
            tag: name of the checkpoint in it.
            custom_load_fn: called with a module's state (`src`) and the module (`dst`) in place of strict loading.

        Returns:
            Path of the file that was loaded, None if there is none, and the client state.
        """
        ...
