"""A decoder of two layers whose groups share their prompt's keys and values.

Shape letters: Q queries, G rollouts a query, P prompt tokens, T response tokens, H heads, E head size, D width, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_HEADS = 2
_LONG = 32
"""Responses of more tokens are scored by PyTorch's fused attention. It is faster, but rounds differently, and the
committed figures of the tasks with short responses were made without it."""


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map [B, L, D] to queries, keys and values [B, H, L, E]."""
        q, k, v = self.qkv(self.norm_attention(x)).unflatten(-1, (3, _HEADS, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def rest(self, x: Tensor, attended: Tensor) -> Tensor:
        """Add attended values [B, H, L, E] and the MLP to the residual stream [B, L, D]."""
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_mlp(x))))


class ToyModel(nn.Module):
    def __init__(self, vocabulary: int, max_length: int, width: int = 64, num_layers: int = 2) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(max_length, width)
        self.blocks = cast(Iterable[Block], nn.ModuleList(Block(width) for _ in range(num_layers)))
        self.norm = nn.LayerNorm(width)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.05)

    def logits(self, x: Tensor) -> Tensor:
        return self.norm(x) @ self.tokens.weight.T

    def read_prompt(self, prompt: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Map [Q, P] to logits [Q, V] of the first response token, and keys and values [Q, H, P, E] of each layer."""
        x = self.tokens(prompt) + self.positions.weight[: prompt.shape[1]]
        cache = []
        for block in self.blocks:
            q, k, v = block.heads(x)
            x = block.rest(x, F.scaled_dot_product_attention(q, k, v, is_causal=True))
            cache.append((k, v))
        return self.logits(x[:, -1]), cache

    def score(self, prompt: Tensor, response: Tensor) -> Tensor:
        """Return teacher-forced log-probs [Q, G, T, V] at every position of response [Q, G, T] to prompt [Q, P]."""
        num_queries, size, length = response.shape
        first, cache = self.read_prompt(prompt)
        x = self.tokens(response[..., :-1]) + self.positions.weight[prompt.shape[1] :][: length - 1]
        x = x.flatten(0, 1)
        attend = _attend_causally if length <= _LONG else _attend_fused
        for block, shared in zip(self.blocks, cache, strict=True):
            q, k, v = block.heads(x)
            x = block.rest(x, attend(q, k, v, shared, num_queries))
        later = self.logits(x).view(num_queries, size, length - 1, -1)
        both = torch.cat([first[:, None, None].expand(-1, size, 1, -1), later], dim=2)
        return torch.log_softmax(both, dim=-1)

    @torch.no_grad()
    def sample(
        self, prompt: Tensor, size: int, length: int, eos: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return responses [Q, G, T], their log-probs [Q, G, T], and which tokens count (up to the first eos).

        Tokens that do not count are eos with log-prob 0.
        """
        num_queries = len(prompt)
        first, shared = self.read_prompt(prompt)
        logprobs = torch.log_softmax(first, -1).repeat_interleave(size, 0)
        alive = torch.ones(num_queries * size, dtype=torch.bool)
        # each layer's keys beside its values, [Q·G, H, T, 2E]
        own = [k.new_empty(num_queries * size, _HEADS, length, 2 * k.shape[-1]) for k, _ in shared]
        chosen, values, counted = [], [], []
        for t in range(length):
            token = torch.where(alive, torch.multinomial(logprobs.exp(), 1, generator=generator)[:, 0], eos)
            chosen.append(token)
            values.append(torch.where(alive, logprobs.gather(1, token[:, None])[:, 0], 0.0))
            counted.append(alive)
            alive = alive & (token != eos)
            if t + 1 == length or not alive.any():
                break
            x = (self.tokens(token) + self.positions.weight[prompt.shape[1] + t])[:, None]
            for block, memory, cache in zip(self.blocks, own, shared, strict=True):
                q, k, v = block.heads(x)
                memory[:, :, t] = torch.cat([k, v], dim=-1)[:, :, 0]
                keys, seen = memory[:, :, : t + 1].chunk(2, dim=-1)
                x = block.rest(x, _attend(q, q @ keys.mT, seen, cache, num_queries))
            logprobs = torch.log_softmax(self.logits(x[:, 0]), -1)
        missing = length - len(chosen)
        shape = (num_queries, size, length)
        tokens = F.pad(torch.stack(chosen, 1), (0, missing), value=eos)
        return (
            tokens.view(shape),
            F.pad(torch.stack(values, 1), (0, missing)).view(shape),
            F.pad(torch.stack(counted, 1), (0, missing), value=False).view(shape),
        )


def _attend_causally(q: Tensor, k: Tensor, v: Tensor, shared: tuple[Tensor, Tensor], num_queries: int) -> Tensor:
    """Attention of [Q·G, H, L, E] to its prompt's [Q, H, P, E] and to its own positions up to each one."""
    future = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    scores = (q @ k.mT).masked_fill(future, -torch.inf)
    return _attend(q, scores, v, shared, num_queries)


def _attend_fused(q: Tensor, k: Tensor, v: Tensor, shared: tuple[Tensor, Tensor], num_queries: int) -> Tensor:
    """Return what `_attend_causally` returns."""
    size = len(q) // num_queries
    keys, values = (
        torch.cat([prompt.repeat_interleave(size, 0), own], dim=2) for prompt, own in zip(shared, (k, v), strict=True)
    )
    seen = torch.ones(q.shape[2], keys.shape[2], dtype=torch.bool).tril(shared[0].shape[2])
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen)


def _attend(
    q: Tensor, own_scores: Tensor, own_values: Tensor, shared: tuple[Tensor, Tensor], num_queries: int
) -> Tensor:
    """Attention of [Q·G, H, L, E] to its prompt's [Q, H, P, E] and to its own positions."""
    keys, values = shared
    size, (length, width) = len(q) // num_queries, q.shape[2:]
    by_query = q.unflatten(0, (num_queries, size)).transpose(1, 2).flatten(2, 3)  # [Q, H, G·L, E]
    to_prompt = (by_query @ keys.mT).unflatten(2, (size, length)).transpose(1, 2).flatten(0, 1)
    weights = torch.softmax(torch.cat([to_prompt, own_scores], dim=-1) * width**-0.5, dim=-1)
    on_prompt, on_own = weights.split([keys.shape[2], own_scores.shape[-1]], dim=-1)
    on_prompt = on_prompt.unflatten(0, (num_queries, size)).transpose(1, 2).flatten(2, 3)
    read = (on_prompt @ values).unflatten(2, (size, length)).transpose(1, 2).flatten(0, 1)
    return read + on_own @ own_values
