"""Log-probs and entropy of chosen tokens, chunk by chunk.

Shape letters: N tokens, D hidden size, V vocabulary, C tokens of a chunk (at most `chunk_tokens`).
No [N, V] tensor exists at any time, forward or backward; the largest is [C, V] in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _ChunkedLogprobs(torch.autograd.Function):
    """Backward computes the logits again: d logp/d logits = (onehot(target) − softmax)/temperature."""

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
    """float32 [C, V]."""
    return torch.log_softmax((hidden @ weight.T).float() / temperature, dim=-1)


def chunked_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, chunk_tokens: int
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target, and entropy of each distribution.

    Args:
        hidden: [N, D], last hidden states; weight: [V, D], output embedding; targets: int64 [N].
        temperature: of the sampling, so that the result is the log-prob of the policy that acts.

    Returns:
        logprobs float32 [N], nats, with gradient; entropy float32 [N], nats, without.
    """
    return _ChunkedLogprobs.apply(hidden, weight, targets, temperature, chunk_tokens)


class LogprobHead(nn.Module):
    """Takes the place of a language-model head: same parameter, but returns log-probs instead of logits.

    A module of its own, so that ZeRO-3's hooks gather the weight once around all chunks.
    """

    def __init__(self, head: nn.Linear, temperature: float, chunk_tokens: int) -> None:
        super().__init__()
        if head.bias is not None:
            raise ValueError("output heads with a bias are not supported; the model must have lm_head.bias = None")
        self.weight: nn.Parameter = head.weight
        self.temperature: float = temperature
        self.chunk_tokens: int = chunk_tokens

    def forward(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [N, D], targets int64 [N] → logprobs [N], entropy [N]."""
        return chunked_logprobs(hidden, self.weight, targets, self.temperature, self.chunk_tokens)
