"""Log-probs and entropies of given tokens, computed chunk by chunk.

Shape letters: N tokens, D hidden size, V vocabulary, C tokens of a chunk (at most `chunk_tokens`).
No [N, V] tensor exists at any time, forward or backward; the largest is [C, V] in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LogitTransform:
    """The end of some heads: logits are multiplied by `scale`, then capped by cap·tanh(z/cap)."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the logits of the model."""
        scaled = logits * self.scale if self.scale != 1.0 else logits
        return scaled if self.cap is None else self.cap * torch.tanh(scaled / self.cap)

    def derivative(self, transformed: Tensor) -> Tensor | float:
        """Return the derivative by the logits before, given those after."""
        return self.scale if self.cap is None else self.scale * (1 - (transformed / self.cap) ** 2)


def logit_transform(config: Any) -> LogitTransform:
    """Return the transform that a model's configuration in transformers names.

    Whether it is the right one is measured when the model is loaded (engines/forward_check.py).
    """
    scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
    scale *= getattr(config, "lm_head_multiplier", None) or 1.0  # Falcon-H1
    scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
    cap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)  # Gemma
    return LogitTransform(scale, cap)


class _ChunkedLogprobs(torch.autograd.Function):
    """The backward pass recomputes the logits z.

    With p = softmax(z/temperature): d logp/d z = (onehot(target) − p)/temperature, and for the entropy H, which is
    computed only if the loss contains it, d H/d z = −p (log p + H)/temperature.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: LogitTransform,
        temperature: float,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        logprobs = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(logprobs)
        for start in range(0, len(hidden), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            log_p = torch.log_softmax(transform(_logits(hidden[rows], weight, bias)) / temperature, dim=-1)
            logprobs[rows] = log_p.gather(1, targets[rows, None]).squeeze(1)
            entropy[rows] = -(log_p.exp() * log_p).sum(1)
        ctx.save_for_backward(hidden, weight, bias, targets, entropy)
        ctx.transform, ctx.temperature, ctx.chunk_tokens = transform, temperature, chunk_tokens
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, entropy = ctx.saved_tensors
        grad, grad_entropy = grads
        grad = torch.zeros_like(entropy) if grad is None else grad
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        grad_bias = None if bias is None else torch.zeros(bias.shape, dtype=torch.float32, device=bias.device)
        for start in range(0, len(hidden), ctx.chunk_tokens):
            rows = slice(start, start + ctx.chunk_tokens)
            logits = ctx.transform(_logits(hidden[rows], weight, bias))
            scale = ctx.transform.derivative(logits) / ctx.temperature
            d_logits = -torch.softmax(logits / ctx.temperature, dim=-1)
            d_logits.scatter_add_(1, targets[rows, None], torch.ones_like(d_logits[:, :1]))
            d_logits *= grad[rows, None] * scale
            if grad_entropy is not None:
                log_p = torch.log_softmax(logits / ctx.temperature, dim=-1)
                d_entropy = log_p.exp() * (log_p + entropy[rows, None])
                d_logits -= d_entropy.mul_(grad_entropy[rows, None] * scale)
            grad_hidden[rows] = d_logits.to(weight.dtype) @ weight
            grad_weight += d_logits.T @ hidden[rows].float()
            if grad_bias is not None:
                grad_bias += d_logits.sum(0)
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight.to(weight.dtype), grad_bias, None, None, None, None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the matrix product, float32 [C, V], of hidden states [C, D]."""
    product = (hidden @ weight.T).float()
    return product if bias is None else product + bias.float()


def chunked_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    chunk_tokens: int,
    *,
    bias: Tensor | None = None,
    transform: LogitTransform = LogitTransform(),
) -> tuple[Tensor, Tensor]:
    """Return the log-prob of each target and the entropy of each distribution.

    Args:
        hidden: [N, D], last hidden states.
        weight: [V, D], output embedding.
        targets: int64 [N].
        temperature: that of the sampling, so that log-probs are those of the policy that acts.
        chunk_tokens: most tokens whose logits exist at a time.
        bias: [V], of the head; None if it has none.
        transform: what the model does with logits after the matrix product.

    Returns:
        Log-probs and entropies, float32 [N], nats, with gradient.
    """
    apply: Callable[..., tuple[Tensor, Tensor]] = _ChunkedLogprobs.apply
    return apply(hidden, weight, bias, targets, transform, temperature, chunk_tokens)


class LogprobHead(nn.Module):
    """Replacement of a language-model head: the same parameters, but log-probs instead of logits.

    It is a module, so that ZeRO-3's hooks gather the weight once for all chunks.
    """

    def __init__(self, head: nn.Module, transform: LogitTransform, temperature: float, chunk_tokens: int) -> None:
        super().__init__()
        self.weight: nn.Parameter = head.get_parameter("weight")
        self.bias: nn.Parameter | None = getattr(head, "bias", None)
        self.transform = transform
        self.temperature: float = temperature
        self.chunk_tokens: int = chunk_tokens

    def forward(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probs [N] and entropies [N], nats, given hidden states [N, D] and targets, int64 [N]."""
        return chunked_logprobs(
            hidden,
            self.weight,
            targets,
            self.temperature,
            self.chunk_tokens,
            bias=self.bias,
            transform=self.transform,
        )
