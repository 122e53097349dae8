"""Transfer of adapters: they are small, so they travel as arguments of calls, whatever the devices are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quatro_ray.weight_sync.engine_client import EngineClient

if TYPE_CHECKING:
    from vllm.distributed.weight_transfer.base import WeightSource


class AdapterTransfer:
    """The trainer's end; there is no connection to make.

    Args:
        client: calls the engines.
        source: the adapters, under their names in peft's files.
        is_sender: whether this rank sends; all ranks iterate over the source.
    """

    def __init__(self, client: EngineClient, source: WeightSource, *, is_sender: bool) -> None:
        self._client, self._source, self._is_sender = client, source, is_sender

    def send_weights(self) -> None:
        """Gather the adapters, a collective, and give them to all engines, which load them afterwards."""
        tensors = {name: tensor.cpu() for name, tensor in self._source if self._is_sender}
        if self._is_sender:
            self._client.receive_adapter(tensors)

    def shutdown(self) -> None:
        """Do nothing: there is no connection."""
