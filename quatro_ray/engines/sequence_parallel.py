"""Ulysses sequence parallelism: a group of ranks shares the tokens of each row, and in attention its heads.

Source: DeepSpeed-Ulysses, arXiv 2309.14509. Shape letters: N tokens of a row, P ranks of a group, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from quatro_ray.errors import ConfigError


@dataclass(frozen=True)
class Ranks:
    """Which rows a rank has: the P ranks of a sequence group have the same ones.

    Attributes:
        rank: this rank.
        num_ranks: all ranks.
        group_size: P; it divides `num_ranks`.
    """

    rank: int
    num_ranks: int
    group_size: int = 1

    @property
    def row_rank(self) -> int:
        """Return the number of this rank's group, which is its place in LearnerBatch.cells."""
        return self.rank // self.group_size

    def sum(self, of_rows: Tensor) -> None:
        """Add up what the ranks computed from their rows, in place, each row once; a collective."""
        if self.rank % self.group_size:
            of_rows.zero_()
        dist.all_reduce(of_rows)

    def make_group(self, deadline_s: float) -> SequenceGroup | None:
        """Return this rank's group, or None if it would be alone; a collective.

        Args:
            deadline_s: time-out of the group's collectives, seconds.
        """
        if self.group_size == 1:
            return None
        firsts = range(0, self.num_ranks, self.group_size)
        members = [list(range(first, first + self.group_size)) for first in firsts]
        groups = [dist.new_group(of_group, timeout=timedelta(seconds=deadline_s)) for of_group in members]
        return SequenceGroup(groups[self.row_rank], self.rank % self.group_size, self.group_size)


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share each row.

    Attributes:
        group: the process group.
        place: number of this rank in the group.
        size: P.
    """

    group: Any
    place: int
    size: int

    def own(self, of_tokens: Tensor) -> Tensor:
        """Return this rank's tokens, [N/P], of values [N]; N is a multiple of P."""
        return of_tokens.chunk(self.size)[self.place]

    def gather(self, own: Tensor) -> Tensor:
        """Join values [N/P] of all ranks to [N]; every rank gets the gradient of its own part of its own loss."""
        joined: Tensor = _Gather.apply(own, self)
        return joined

    def attend(self, attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Compute attention on all N tokens and H/P heads, between two exchanges.

        Args:
            attend: maps query, key and value [1, heads, N, D] to [1, N, heads, D].
            query: [1, H, N/P, D].
            key: [1, K, N/P, D]. K divides P, or P divides K.
            value: [1, K, N/P, D].

        Returns:
            [1, N/P, H, D].

        Raises:
            ConfigError: the heads of this layer cannot be divided so; all ranks raise it.
        """
        from deepspeed.sequence.layer import DistributedAttention

        def on_all_tokens(*parts: Tensor) -> Tensor:
            return attend(*(part.transpose(1, 2) for part in parts))

        heads, key_heads = query.shape[1], key.shape[1]
        if heads % self.size or (key_heads % self.size and self.size % key_heads):
            raise ConfigError(
                f"learner.sequence_parallel_size={self.size}: a layer of the model has {heads} attention heads and "
                f"{key_heads} key-value heads, which cannot be divided so; choose another"
            )
        copies = max(1, self.size // key_heads)
        own = [query, key.repeat_interleave(copies, dim=1), value.repeat_interleave(copies, dim=1)]
        exchange = DistributedAttention(on_all_tokens, self.group, scatter_idx=2, gather_idx=1)
        attended: Tensor = exchange(*(part.transpose(1, 2).contiguous() for part in own), 0)
        return attended


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, group: SequenceGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(own) for _ in range(group.size)]
        dist.all_gather(parts, own.contiguous(), group=group.group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        # all ranks of the group compute the same loss from the joined values, so nothing has to be exchanged
        return ctx.group.own(grads[0]), None
