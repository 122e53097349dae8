"""Checksums of parameters, which engine workers and the learner compute alike, on the device that has them.

Log-probs tell whether both hold about the same policy. A tensor that an update has missed changes them by less than
rounding does, and only its bits show it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 22
"""Elements that are widened to 64 bits at the same time."""


def tensor_checksum(tensor: Tensor) -> str:
    """Return dtype, shape and checksum of a tensor, such as "bfloat16 3x5 8128".

    The checksum is Σ (2i + 1)·x_i modulo 2⁶⁴, where x_i is what the bits of element i are as an integer. It does not
    depend on the order of the sum. A change of one element always changes it, because the factors are odd.
    """
    bits = tensor.detach().reshape(-1).view(_BITS[tensor.element_size()])
    total = 0
    for start in range(0, bits.numel(), _CHUNK):
        part = bits[start : start + _CHUNK].long()
        factors = torch.arange(start, start + part.numel(), device=part.device) * 2 + 1
        total += int((part * factors).sum())
    shape = "x".join(map(str, tensor.shape))
    return f"{str(tensor.dtype).removeprefix('torch.')} {shape} {total % 2**64}"


class ChecksumWorker:
    """An extension of vLLM's worker class (`worker_extension_cls`)."""

    model_runner: Any

    def parameter_checksums(self) -> dict[str, str]:
        """Return the checksums of this worker's parameters, by vLLM's names."""
        model = self.model_runner.get_model()
        return {name: tensor_checksum(parameter) for name, parameter in model.named_parameters()}
