"""The `weight_sync` section: the transfer of weights from learner to engines."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from quatro_ray.config.base import Section

NUM_TRANSFER_BUFFERS = 2
"""One is filled or emptied while the other is under way."""


class WeightSyncConfig(Section):
    """The transfer of weights from learner to engines, through vLLM's own weight transfer."""

    backend: Literal["auto", "nccl", "ipc", "gloo"] = "auto"
    """Transport of the weights. auto: gloo (our back end through host memory) on CPUs; on GPUs nccl, or ipc if engines
    share them with the ranks (cluster.colocate)."""
    rendezvous_deadline_s: float = Field(120, gt=0)
    """Seconds within which learner and engines must connect to each other, and within which the learner must be free
    again after a transfer that failed; else it counts as lost."""
    pause_deadline_s: float = Field(30, gt=0)
    """Seconds within which an engine must pause generation, or with gloo begin to receive; one that does not is
    restarted."""
    transfer_deadline_s: float = Field(300, gt=0)
    """Seconds within which the weights must arrive, and with gloo be loaded after that. Raise it for large models or
    slow networks."""
    buffer_mib: int = Field(256, ge=1)
    """Size of a buffer of the transfer, MiB of GPU memory. With nccl learner rank 0 and each device of an engine have
    two, which grow by the tensor that crosses their end, so that the largest tensor (the embedding) may come on top.
    With ipc each rank has one while it sends, at least as large as that tensor."""
    resume_deadline_s: float = Field(30, gt=0)
    """Seconds within which an engine must resume generation and report its version."""
    check_every_updates: int = Field(10, ge=1)
    """Updates from one check to the next that engines and learner give the same log-probs to the same tokens, that
    tokens are sampled with these log-probs, and that the parameters that both store alike are equal bit by bit. The
    first update is always checked."""
    max_logprob_abs_diff: float | None = Field(None, gt=0)
    """Largest mean difference of these log-probs, in nats. An engine beyond it gets the weights again, then is
    restarted, then the run ends. null: 0.01 if learner and engines use float32, else 0.3."""
    check_deadline_s: float = Field(120, gt=0)
    """Seconds within which an engine must give its log-probs or checksums, and the learner too."""
