"""Log-probs and entropies of given tokens, computed chunk by chunk.

Shape letters: N tokens, D hidden size, V vocabulary, C tokens of a chunk (at most `chunk_tokens`).
No [N, V] tensor exists at any time, forward or backward. A chunk's logits are one float32 tensor [C, V], which becomes
their gradient in place; beside it there are a few rows of it, and in the backward pass its copy in the weights' dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_ROWS_AT_A_TIME = 64
"""Rows of a chunk for which a second tensor exists."""


@dataclass(frozen=True)
class LogitTransform:
    """The end of some heads: logits are multiplied by `scale`, then capped by cap·tanh(z/cap)."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the logits of the model, computed in place."""
        scaled = logits.mul_(self.scale) if self.scale != 1.0 else logits
        return scaled if self.cap is None else scaled.div_(self.cap).tanh_().mul_(self.cap)

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

    With p = softmax(z/temperature): d logp/d z = (onehot(target) − p)/temperature, and for the entropy H, whose term is
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
        entropy, log_sum = torch.empty_like(logprobs), torch.empty_like(logprobs)
        for chunk in _slices(len(hidden), chunk_tokens):
            logits = transform(_logits(hidden[chunk], weight, bias)).div_(temperature)
            logprobs[chunk] = logits.gather(1, targets[chunk, None]).squeeze(1)
            for rows in _slices(len(logits), _ROWS_AT_A_TIME):
                at = slice(chunk.start + rows.start, chunk.start + rows.stop)
                log_sum[at] = logits[rows].logsumexp(1)
                p = (logits[rows] - log_sum[at, None]).exp_()
                entropy[at] = log_sum[at] - p.mul_(logits[rows]).sum(1)
        logprobs -= log_sum
        ctx.save_for_backward(hidden, weight, bias, targets, entropy, log_sum)
        ctx.transform, ctx.temperature, ctx.chunk_tokens = transform, temperature, chunk_tokens
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, entropy, log_sum = ctx.saved_tensors
        grad, grad_entropy = grads
        grad = torch.zeros_like(entropy) if grad is None else grad
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        grad_bias = None if bias is None else torch.zeros(bias.shape, dtype=torch.float32, device=bias.device)
        for chunk in _slices(len(hidden), ctx.chunk_tokens):
            logits = ctx.transform(_logits(hidden[chunk], weight, bias))
            for rows in _slices(len(logits), _ROWS_AT_A_TIME):
                at = slice(chunk.start + rows.start, chunk.start + rows.stop)
                scale = ctx.transform.derivative(logits[rows]) / ctx.temperature
                log_p = logits[rows].div_(ctx.temperature).sub_(log_sum[at, None])
                p = log_p.exp()
                if grad_entropy is None:
                    d_logits = log_p.copy_(p).mul_(-grad[at, None])
                else:
                    weighted = log_p.add_(entropy[at, None]).mul_(grad_entropy[at, None]).add_(grad[at, None])
                    d_logits = weighted.mul_(p).neg_()
                d_logits.scatter_add_(1, targets[at, None], grad[at, None])
                d_logits *= scale
            if grad_bias is not None:
                grad_bias += logits.sum(0)
            d_chunk = logits.to(weight.dtype)
            grad_hidden[chunk] = d_chunk @ weight
            _add_product(grad_weight, logits, d_chunk, hidden[chunk])
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight.to(weight.dtype), grad_bias, None, None, None, None


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the matrix product, float32 [C, V] and never rounded to the weights' dtype, of hidden states [C, D]."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        product = torch.mm(hidden, weight.T, out_dtype=torch.float32)
    else:
        product = hidden.float() @ weight.float().T
    return product if bias is None else product.add_(bias)


def _add_product(total: Tensor, exact: Tensor, rounded: Tensor, hidden: Tensor) -> None:
    """Add the weight's gradient of a chunk to a float32 total [V, D].

    Args:
        total: float32 [V, D].
        exact: float32 [C, V], gradient of the logits.
        rounded: the same in the dtype of the weights, whose products GPUs compute fastest.
        hidden: [C, D].
    """
    if hidden.is_cuda and hidden.dtype != torch.float32:
        total += torch.mm(rounded.T, hidden, out_dtype=torch.float32)
    else:
        total.addmm_(exact.T, hidden.float())


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
