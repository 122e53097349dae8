"""Log-probs and entropies of given tokens, computed chunk by chunk.

Shape letters: N tokens, D hidden size, V vocabulary, C tokens of a chunk (at most `chunk_tokens`).
No [N, V] tensor exists at any time, forward or backward; the largest is [C, V] in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class _ChunkedLogprobs(torch.autograd.Function):
    """The backward pass recomputes the logits: d logp/d logits = (onehot(target) − softmax)/temperature."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk_tokens: int
    ) -> tuple[Tensor, Tensor]:
        logprobs = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        entropy = torch.empty_like(logprobs)
        for start in range(0, len(hidden), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            log_p = _log_softmax(hidden[rows], weight, temperature)
            logprobs[rows] = log_p.gather(1, targets[rows, None]).squeeze(1)
            entropy[rows] = -(log_p.exp() * log_p).sum(1)
        ctx.save_for_backward(hidden, weight, targets)
        ctx.temperature, ctx.chunk_tokens = temperature, chunk_tokens
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, None, None, None]:
        hidden, weight, targets = ctx.saved_tensors
        grad = grads[0]
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for start in range(0, len(hidden), ctx.chunk_tokens):
            rows = slice(start, start + ctx.chunk_tokens)
            d_logits = -_log_softmax(hidden[rows], weight, ctx.temperature).exp()
            d_logits.scatter_add_(1, targets[rows, None], torch.ones_like(d_logits[:, :1]))
            d_logits *= grad[rows, None] / ctx.temperature
            grad_hidden[rows] = d_logits.to(weight.dtype) @ weight
            grad_weight += d_logits.T @ hidden[rows].float()
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None


def _log_softmax(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """Return log-probs, float32 [C, V], of hidden states [C, D]."""
    return torch.log_softmax((hidden @ weight.T).float() / temperature, dim=-1)


def chunked_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk_tokens: int
) -> tuple[Tensor, Tensor]:
    """Return the log-prob of each target and the entropy of each distribution.

    Args:
        hidden: [N, D], last hidden states.
        weight: [V, D], output embedding.
        targets: int64 [N].
        temperature: that of the sampling, so that log-probs are those of the policy that acts.
        chunk_tokens: most tokens whose logits exist at a time.

    Returns:
        Log-probs, float32 [N], nats, with gradient; entropies, float32 [N], nats, without.
    """
    apply: Callable[..., tuple[Tensor, Tensor]] = _ChunkedLogprobs.apply
    return apply(hidden, weight, targets, temperature, chunk_tokens)


class LogprobHead(nn.Module):
    """Replacement of a language-model head: the same parameter, but log-probs instead of logits.

    It is a module, so that ZeRO-3's hooks gather the weight once for all chunks.
    """

    def __init__(self, head: nn.Linear, temperature: float, chunk_tokens: int) -> None:
        super().__init__()
        if head.bias is not None:
            raise ValueError("lm_head has a bias, which is not supported; choose a model with lm_head.bias = None")
        self.weight: nn.Parameter = head.weight
        self.temperature: float = temperature
        self.chunk_tokens: int = chunk_tokens

    def forward(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probs [N] and entropies [N], nats, given hidden states [N, D] and targets, int64 [N]."""
        return chunked_logprobs(hidden, self.weight, targets, self.temperature, self.chunk_tokens)
