"""ZeRO-3 parameters as a vLLM WeightSource."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource, layerwise_groups


class ZeroWeightSource(WeightSource):
    """Gathers one layer at a time, in the same order on all ranks: iterating is a collective.

    At most one layer exists in full at any time.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._groups = layerwise_groups(list(parameters))
        self._parameters = parameters

    def metadata(self) -> list[ParamMeta]:
        return [
            ParamMeta(name, self._parameters[name].dtype, _full_shape(self._parameters[name]))
            for group in self._groups
            for name in group
        ]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        from deepspeed import zero

        for group in self._groups:
            with torch.no_grad(), zero.GatheredParameters([self._parameters[name] for name in group]):
                # clones outlive the gather, which a sender that overlaps its sends needs
                full = [(name, self._parameters[name].detach().clone()) for name in group]
            yield from full


def _full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
