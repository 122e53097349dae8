"""ZeRO-3 parameters as a vLLM WeightSource."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource, layerwise_groups


class Streams:
    """Orders the work on CUDA streams; a sender such as vLLM's reads tensors on streams of its own. No-op on CPU."""

    def finish(self, tensors: Iterable[Tensor]) -> None:
        """Wait until the current stream has written these tensors, so that any stream may read them."""
        if any(tensor.is_cuda for tensor in tensors):
            torch.cuda.current_stream().synchronize()

    def lend(self, tensor: Tensor) -> None:
        """Keep the memory of a tensor until the current stream has read it, even if the tensor is gone by then."""
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream())


class ZeroWeightSource(WeightSource):
    """Iterates over full parameters, gathered one layer at a time in the same order on all ranks: a collective.

    At most one layer exists in full at any time.

    Args:
        parameters: by name in transformers.
        convert: returns the tensors of a layer, all of them or none on the meta device, under their names and in their
            layout on disk, which are those that vLLM loads.
        streams: orders reads and writes on the device.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        convert: Callable[[dict[str, Tensor]], dict[str, Tensor]],
        streams: Streams | None = None,
    ) -> None:
        self._groups = layerwise_groups(list(parameters))
        self._parameters = parameters
        self._convert = convert
        self._streams = streams or Streams()
        self._pass: Iterator[tuple[str, Tensor]] | None = None

    def metadata(self) -> list[ParamMeta]:
        """Return name, dtype and full shape of every parameter, in the order of the iteration; nothing is gathered."""
        converted: dict[str, Tensor] = {}
        for group in self._groups:
            converted |= self._convert({name: _whole_on_meta(self._parameters[name]) for name in group})
        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in converted.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self._pass = self._gathered()
        return self._pass

    @contextmanager
    def whole_pass(self) -> Iterator[None]:
        """Guarantee that this rank takes part in one whole pass over the weights, even after an error in the body.

        On leaving the `with` block, the rest of the pass begun in it is iterated, or a whole pass if none was begun.
        Otherwise the other ranks, which are in that pass, would wait for ever.
        """
        self._pass = None
        self._streams.finish(self._parameters.values())  # the optimiser writes on this stream
        try:
            yield
        finally:
            for _ in self._gathered() if self._pass is None else self._pass:
                pass

    def _gathered(self) -> Iterator[tuple[str, Tensor]]:
        from deepspeed import zero

        for group in self._groups:
            with torch.no_grad(), zero.GatheredParameters([self._parameters[name] for name in group]):
                # clones outlive the gather; a sender that overlaps its sends needs that
                full = {name: self._parameters[name].detach().clone() for name in group}
            converted = self._convert(full)
            self._streams.finish(converted.values())
            for name, tensor in converted.items():
                self._streams.lend(tensor)
                yield name, tensor


def _whole_on_meta(parameter: nn.Parameter) -> Tensor:
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    return torch.empty(shape, dtype=parameter.dtype, device="meta")
