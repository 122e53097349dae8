"""Attention and head of the learner on a GPU against the same in float32 on the CPU: `python -m benchmarks.gpu.ops`.

Both get the same inputs, rounded to the dtype that is tried. Differences are relative to the norm of what is expected.
`--device cpu` tries the paths of the CPU. The last line is JSON; the exit status is 1 if rounding does not explain a
difference.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from quatro_ray.engines.logprob_head import LogitTransform, chunked_logprobs
from quatro_ray.engines.varlen_attention import varlen_attention

_LENGTHS = (700, 1, 64, 259)
_MOST = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
"""Largest relative difference that rounding explains."""


def attention(window: int | None) -> Callable[[list[Tensor]], Tensor]:
    """Return attention over four packed sequences; inputs are query, key and value [1, heads, N, D]."""
    mask = None if window is None else torch.full((1, 1, 1, 1), window)

    def compute(inputs: list[Tensor]) -> Tensor:
        query, key, value = inputs
        attended, _ = varlen_attention(
            nn.Module(), query, key, value, mask, sliding_window=window, sequence_lengths=_LENGTHS
        )
        return attended

    return compute


def head(transform: LogitTransform) -> Callable[[list[Tensor]], Tensor]:
    """Return log-probs and a tenth of the entropies; inputs are hidden states [N, D] and the weight [V, D]."""

    def compute(inputs: list[Tensor]) -> Tensor:
        hidden, weight = inputs
        targets = torch.arange(len(hidden), device=hidden.device) * 7 % len(weight)
        logprobs, entropy = chunked_logprobs(hidden, weight, targets, 0.8, 256, transform=transform)
        return logprobs + 0.1 * entropy

    return compute


def cases() -> Iterator[tuple[str, Callable[[list[Tensor]], Tensor], list[Tensor]]]:
    """Yield the name of a case, the operation, and its inputs."""
    torch.manual_seed(0)
    count = sum(_LENGTHS)

    def heads(number: int, size: int) -> Tensor:
        return torch.randn(1, number, count, size, dtype=torch.float64)

    for name, kv, size, window in (
        ("attention, 12 heads of 128, 2 for keys", 2, 128, None),
        ("attention, 12 heads of 64", 12, 64, None),
        ("attention, window of 128", 2, 128, 128),
    ):
        yield name, attention(window), [heads(12, size), heads(kv, size), heads(kv, size)]
    hidden, weight = torch.randn(count, 256).double(), torch.randn(5000, 256).double() / 8
    yield "head", head(LogitTransform()), [hidden, weight]
    yield "head, scale and cap", head(LogitTransform(scale=0.5, cap=30.0)), [hidden, weight]


def results(operation: Callable[[list[Tensor]], Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Return the output and the gradients of a weighted sum of it, in float64 on the CPU."""
    leaves = [values.detach().clone().requires_grad_() for values in inputs]
    output = operation(leaves)
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape)
    gradients = torch.autograd.grad((output * weights.to(output)).sum(), leaves)
    return [values.detach().double().cpu() for values in (output, *gradients)]


def difference(
    operation: Callable[[list[Tensor]], Tensor], inputs: list[Tensor], dtype: torch.dtype, device: str
) -> float:
    """Return the largest relative difference of the output and of each gradient."""
    rounded = [values.to(dtype) for values in inputs]
    found = results(operation, [values.to(device) for values in rounded])
    # float32 on the CPU, because the head computes in float32
    expected = results(operation, [values.float() for values in rounded])
    pairs = zip(found, expected, strict=True)
    return max(float((one - other).norm() / other.norm()) for one, other in pairs)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    name_of_device = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(name_of_device, "torch", torch.__version__, flush=True)
    figures: dict[str, Any] = {}
    failed = False
    for name, operation, inputs in cases():
        for dtype, most in _MOST.items():
            found = difference(operation, inputs, dtype, device)
            failed |= not found <= most
            figures[f"{name}, {str(dtype).removeprefix('torch.')}"] = float(f"{found:.2g}")
            print(name, dtype, f"{found:.2g} (at most {most:g})", flush=True)
    print(json.dumps({"device": name_of_device, "differences": figures}))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
