"""The `learner` section: the DeepSpeed ZeRO-3 group that trains the policy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from quatro_ray.config.base import Section
from quatro_ray.config.lora import LoraConfig

AggregationMode = Literal[
    "token_mean", "prompt_mean", "seq_mean_token_sum", "seq_mean_token_mean", "seq_mean_token_sum_norm"
]


class StepControlConfig(Section):
    """Shortens an optimiser step after the fact if it changed the policy by more than its KL budget."""

    window_kl_nats_per_token: float | None = Field(0.06, gt=0)
    """ε_window: KL(π_k ‖ π_k+1) of one step may be at most ε_window/(1 + staleness), nats per token. null: no step
    control."""
    max_kl_nats_per_token: float = Field(4e-4, gt=0)
    """Upper bound of one step's KL however fresh its samples are, nats per token."""
    probe_share: float = Field(0.125, gt=0, le=1)
    """Share of each query's rollouts on which the KL is measured. It costs a pass without gradient over them before the
    step, and mostly one after it; raise it if the measured KL is noisy."""


class LearnerConfig(Section):
    """The DeepSpeed ZeRO-3 group that trains the policy."""

    num_ranks: int = Field(ge=1)
    """Learner processes, one per device on CUDA; weights, gradients and optimiser states are sharded over them."""
    sequence_parallel_size: int = Field(1, ge=1)
    """Ranks that share the tokens of each row (Ulysses), for responses whose activations fill a GPU. It divides
    num_ranks; num_ranks/sequence_parallel_size rows are computed at a time."""
    hpz_partition_size: int = Field(1, ge=1)
    """Ranks, mostly those of a node, that hold a copy of all weights together (ZeRO++ hpZ), so that backward passes
    gather them from near; it divides num_ranks. 1: no copies, which takes least memory."""
    learning_rate: float = Field(gt=0)
    """Peak learning rate of AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Course of the learning rate after the warm-up: constant, or decaying to 0 at run.num_steps."""
    num_minibatches: int = Field(1, ge=1)
    """Optimiser steps per batch: its groups are split into so many minibatches. The policy at the start of the batch
    stays the proximal one, around which decoupled_ppo, tis_grpo and mis_grpo clip. More than 1 learns more from each
    sample and makes the later steps stale. The learner counts staleness in optimiser steps, replay in batches."""
    num_warmup_steps: int = Field(0, ge=0)
    """Optimiser steps over which the learning rate rises linearly from 0."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay of AdamW."""
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    """Decay rate of AdamW's mean of gradients."""
    adam_beta2: float = Field(0.95, ge=0, lt=1)
    """Decay rate of AdamW's mean of squared gradients."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradient clipping: the largest global L2 norm of the gradient of one step."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Number format of weights and activations in forward and backward passes. float32 suits CPUs."""
    tokens_per_micro_batch: int = Field(ge=1)
    """Prompt and response tokens in one packed row; must hold the longest rollout. Lower it if memory runs out."""
    logprob_chunk_tokens: int = Field(1024, ge=1)
    """Tokens whose logits exist at the same time. Lower it if the vocabulary is large and memory runs out."""
    loss_agg_mode: AggregationMode | None = None
    """How the per-token losses of the global batch become one number: token_mean; prompt_mean (queries weigh the same
    at any length); seq_mean_token_sum; seq_mean_token_mean; or seq_mean_token_sum_norm (divides by the longest response
    allowed). null: that of the objective's paper."""
    step_control: StepControlConfig = StepControlConfig()
    """Limit on how far one step may move the policy."""
    entropy_target_nats: float | None = Field(None, gt=0)
    """Entropy per token that an adaptive bonus holds, nats. The demo's policy ends near 0.5 without one
    (policy/entropy). null: no bonus."""
    entropy_coef_step: float = Field(0.005, gt=0)
    """Change of the bonus's coefficient after each step: up below the target, down to 0 above it."""
    lora: LoraConfig | None = None
    """Adapters to train in place of all weights. null: all weights are trained."""
    reference_kl_coef: float = Field(0.0, ge=0)
    """Weight of KL(π_θ ‖ π_ref) in the loss, π_ref being the starting policy. 0: no reference model is loaded.
    With lora none is loaded either: the policy computes without its adapters."""
    attn_implementation: Literal["auto", "varlen", "sdpa", "eager", "flash_attention_2", "flex_attention"] = "auto"
    """Attention of the transformers model. varlen: each packed sequence by itself, without a mask, whose memory and
    time would grow with the square of a row. auto: varlen if the log-probs stay the model's own, otherwise sdpa or
    eager. flash_attention_2 (package flash-attn) and flex_attention need CUDA."""
    gradient_checkpointing: bool = False
    """Recompute the activations of each layer in the backward pass: less memory, slower steps."""
    offload: Literal["none", "cpu"] = "none"
    """Device of the optimiser states. cpu: host memory, which frees GPU memory and slows the optimiser step."""
    offload_parameters: bool = False
    """Keep the weights in host memory too, and copy each layer to the GPU when it computes; needs offload=cpu."""
    start_deadline_s: float = Field(600, gt=0)
    """Seconds within which all ranks must start and load the policy or a checkpoint."""
    step_deadline_s: float = Field(600, gt=0)
    """Seconds within which one optimiser step must end; also the time-out of collectives. Raise it for big batches."""
    max_restarts: int = Field(3, ge=0)
    """Consecutive restarts of all ranks from the newest checkpoint without a step in between, before the run ends."""

    def broken_rules(self) -> Iterator[str]:
        """Yield a line if parameters would be offloaded without the optimiser, or groups do not divide the ranks."""
        if self.offload_parameters and self.offload == "none":
            yield "offload_parameters=true needs offload=cpu, because the optimiser updates the weights where they are"
        for name in ("sequence_parallel_size", "hpz_partition_size"):
            if self.num_ranks % (size := getattr(self, name)):
                yield f"{name}={size} must divide num_ranks={self.num_ranks}; change one of the two"
