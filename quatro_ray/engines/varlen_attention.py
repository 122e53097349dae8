"""Variable-length attention: each token of a packed row attends to the earlier tokens of its own sequence, unmasked.

A mask of a packed row of N tokens has N² entries, and fast kernels take none. Here each sequence is attended to by
itself: by one call of torch's variable-length kernel on CUDA, and by one call per sequence elsewhere. transformers
calls `varlen_attention` in every layer of a model that is loaded with `attn_implementation="varlen"`.

Shape letters: B rows, N tokens of a row, H query heads, K key-value heads, D head size.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from quatro_ray.engines.sequence_parallel import SequenceGroup

VARLEN = "varlen"
_NOT_COMPUTED = ("softcap", "s_aux", "position_bias", "head_mask", "cache")
"""Arguments of the attention of some models that neither kernel supports."""


class UnsupportedAttentionError(ValueError):
    """The model restricts or changes its attention in a way that needs a mask or another kernel."""


def register() -> None:
    """Make "varlen" known to transformers."""
    AttentionInterface.register(VARLEN, varlen_attention)
    AttentionMaskInterface.register(VARLEN, _window_in_place_of_a_mask)


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    sequence_lengths: tuple[int, ...] | None = None,
    sequence_group: SequenceGroup | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Compute causal attention within each sequence.

    Args:
        module: the attention layer.
        query: [B, H, N, D].
        key: [B, K, N, D].
        value: [B, K, N, D].
        attention_mask: what `_window_in_place_of_a_mask` returned.
        dropout: share of the attention weights that become 0.
        scaling: factor on the products of queries and keys; 1/√D if None.
        sliding_window: a token attends to so many tokens, itself included; to all before it if None.
        is_causal: must not be False, here or as an attribute of the module.
        sequence_lengths: tokens of each sequence of the one row; None if each row is one sequence.
        sequence_group: the ranks that share the row, of which this one has N tokens; None if it has all.
        others: further arguments of transformers.

    Returns:
        [B, N, H, D], and no attention weights.

    Raises:
        UnsupportedAttentionError: the model needs more than this computes.
    """
    asked = [name for name in _NOT_COMPUTED if others.get(name) is not None]
    if asked or not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise UnsupportedAttentionError(f"attention with {asked[0] if asked else 'tokens that follow'}")
    window = None if attention_mask is None else int(attention_mask)
    if window != sliding_window and attention_mask is not None:
        raise UnsupportedAttentionError(f"a mask of {window} tokens that is no sliding window")
    if sequence_lengths is None:
        return _causal(query, key, value, dropout, scaling, window).transpose(1, 2), None
    attend = partial(_attend_packed, lengths=sequence_lengths, dropout=dropout, scaling=scaling, window=window)
    if sequence_group is not None:
        return sequence_group.attend(attend, query, key, value), None
    return attend(query, key, value), None


def _attend_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    lengths: tuple[int, ...],
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """Return [1, N, H, D] for one row of sequences."""
    if query.is_cuda and query.dtype != torch.float32 and dropout == 0.0:
        return _one_call(query, key, value, lengths, scaling, window)
    parts = zip(*(t.split(lengths, dim=2) for t in (query, key, value)), strict=True)
    attended = [_causal(q, k, v, dropout, scaling, window) for q, k, v in parts]
    return torch.cat([part.transpose(1, 2) for part in attended], dim=1)


def _window_in_place_of_a_mask(*, local_size: int | None = None, use_vmap: bool = False, **_: Any) -> Tensor | None:
    """Return the tokens to which a token attends, in the mask's place [1, 1, 1, 1] and on the CPU; None if all.

    transformers calls this once for each kind of mask that a model has, and passes the result to its layers. A layer
    with such a mask must have the same sliding window, because a mask of chunks has a size too.

    Raises:
        UnsupportedAttentionError: the model adds its own rule to the causal mask.
    """
    if use_vmap:
        raise UnsupportedAttentionError("a mask with a rule of its own")
    return None if local_size is None else torch.full((1, 1, 1, 1), local_size)


def _causal(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None, window: int | None
) -> Tensor:
    """Return [B, H, N, D] for rows that are one sequence each."""
    gqa = query.shape[1] != key.shape[1]
    length = query.shape[2]
    mask = None
    if window is not None and length > window:
        mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril().triu(1 - window)
    if gqa and (mask is not None or key.shape[-1] != value.shape[-1] or query.is_cuda):
        # otherwise torch would take a kernel that keeps all products of queries and keys
        groups = query.shape[1] // key.shape[1]
        key, value, gqa = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), False
    return F.scaled_dot_product_attention(
        query, key, value, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=gqa
    )


def _one_call(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], scaling: float | None, window: int | None
) -> Tensor:
    """Return [1, N, H, D] for one row of sequences, on CUDA."""
    from torch.nn.attention.varlen import varlen_attn

    ends = _cumulative(lengths, query.device)
    size = query.shape[-1]
    values = F.pad(value, [0, size - value.shape[-1]])  # the kernel wants one head size
    attended = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        values[0].transpose(0, 1),
        ends,
        ends,
        max(lengths),
        max(lengths),
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(attended, Tensor)
    return attended[None, :, :, : value.shape[-1]]


@lru_cache(maxsize=8)
def _cumulative(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Return int32 [n + 1]: where each sequence starts, and N. Every layer of a forward pass asks for the same."""
    return F.pad(torch.tensor(lengths).cumsum(0), [1, 0]).to(device, torch.int32)
