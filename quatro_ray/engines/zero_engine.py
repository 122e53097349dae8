"""The part of DeepSpeed's ZeRO-3 engine that the learner uses; DeepSpeed has no types of its own."""

from __future__ import annotations

from collections.abc import Mapping
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
    def invalidate_secondary_tensor(self) -> None: ...


class ZeroEngine(Protocol):
    """DeepSpeedEngine around an engines/policy.py:PolicyModel."""

    optimizer: ZeroOptimizer
    _config: Any

    def __call__(self, token_ids: Tensor, position_ids: Tensor, target_ids: Tensor) -> tuple[Tensor, Tensor]: ...
    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None: ...
    def backward(self, loss: Tensor) -> object: ...
    def step(self) -> None: ...
    def was_step_applied(self) -> bool: ...
    def get_global_grad_norm(self) -> float | None: ...
    def bfloat16_enabled(self) -> bool: ...
    def save_checkpoint(
        self, save_dir: str, *, tag: str, client_state: Mapping[str, Any], save_latest: bool
    ) -> object: ...
    def load_checkpoint(self, load_dir: str, *, tag: str) -> tuple[str | None, Any]: ...
