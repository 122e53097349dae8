"""KL(π_k ‖ π_k+1) on a part of the step's batch, with one pass without gradient and one all-reduce.

Shape letters: N tokens of a micro-batch, Q queries, G rollouts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from quatro_ray.ops.step_control import ProbeKl, rollout_kl


class Probe:
    """The first rollouts of this rank's micro-batches, cut where a rollout ends, with their log-probs under π_k."""

    def __init__(
        self, micro_batches: Sequence[dict[str, Tensor]], start_logprobs: Sequence[Tensor], share: float, cells: Tensor
    ) -> None:
        """micro_batches: tensors of types.MicroBatch by name; start_logprobs: [N] each; cells: bool [Q, G], valid.

        Every rank has the same number of micro-batches, and so takes part in the same number of passes.
        """
        wanted = share * len(micro_batches)
        count = math.ceil(wanted)
        last = wanted - (count - 1)
        self._parts = [_head(t, s, 1.0) for t, s in zip(micro_batches[: count - 1], start_logprobs, strict=False)]
        self._parts.append(_head(micro_batches[count - 1], start_logprobs[count - 1], last))
        self._shape = cells.shape

    def measure(self, forward: Callable[[dict[str, Tensor]], Tensor], query_staleness: Tensor) -> ProbeKl:
        """forward: tensors of a micro-batch → log-probs [N]. query_staleness: float64 [Q]. A collective."""
        num_cells = self._shape.numel()
        totals = torch.zeros(2, num_cells, dtype=torch.float64, device=query_staleness.device)
        for t, start in self._parts:
            logprobs = forward(t)
            index = t["rollout_index"]
            totals[0] += rollout_kl(logprobs, start, t["behavior_logprobs"], t["is_response"], index, num_cells)
            totals[1, index[index >= 0]] = 1
        dist.all_reduce(totals)
        kl, count = totals.view(2, *self._shape).sum(2)
        probed = count > 0
        return ProbeKl(kl[probed] / count[probed], query_staleness[probed])


def _head(t: dict[str, Tensor], start_logprobs: Tensor, share: float) -> tuple[dict[str, Tensor], Tensor]:
    """The first sequences, that hold at least this share of the tokens; attention is causal, so they stay the same."""
    ends = [*(t["position_ids"] == 0).nonzero().flatten()[1:].tolist(), len(start_logprobs)]
    wanted = share * len(start_logprobs)
    cut = next(end for end in ends if end >= wanted or end == ends[-1])
    return {name: value[:cut] for name, value in t.items()}, start_logprobs[:cut]
