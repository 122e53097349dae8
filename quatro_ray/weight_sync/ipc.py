"""Weight transfer inside a GPU: an engine reads the buffer of the rank with which it shares the device (vLLM's `ipc`).

Every rank packs the gathered weights into a buffer of its own, and each engine finds the one on its device. There is no
connection that could hang: each piece of the weights is a call of the engines, which has a deadline.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.weight_transfer.base import VLLMWeightSyncClient, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo


class IpcTransfer:
    """The trainer's end on one rank.

    Args:
        info: this rank, and the size of its buffer. Rank 0 calls the engines.
        client: calls the engines.
        source: the weights in checkpoint format.
    """

    def __init__(self, info: IPCTrainerInitInfo, client: VLLMWeightSyncClient, source: WeightSource) -> None:
        self._client = PatientClient(client)
        self._engine = WeightTransferTrainerFactory.trainer_init(info, client=self._client, source=source)

    def send_weights(self) -> None:
        """Send all weights; a collective over the learner ranks.

        Raises:
            Exception: what the first call that failed has raised, after all ranks have come to the end.
        """
        self._engine.send_weights()
        self._client.raise_failure()

    def shutdown(self) -> None:
        """Do nothing: there is no connection, and the buffer exists only while weights are sent."""


class PatientClient(VLLMWeightSyncClient):
    """Keeps the first failure of an update instead of raising it, and then makes no further call.

    The ranks meet after each piece of the weights. If rank 0 left at a failure of an engine, the others would wait.
    """

    def __init__(self, client: VLLMWeightSyncClient) -> None:
        self._client = client
        self._failure: Exception | None = None

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Tell the engines how the weights are packed; raises at once, because no rank waits yet."""
        self._client.init_weight_transfer_engine(init_info)

    def start_weight_update(self) -> None:
        """Prepare the engines to receive a whole set of weights."""
        self._unless_failed("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        """Let the engines load what is in the buffers."""
        self._unless_failed("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Complete the update of the engines."""
        self._unless_failed("finish_weight_update", weight_version)

    def raise_failure(self) -> None:
        """Raise the failure of this update, if there was one, and forget it."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _unless_failed(self, method: str, *args: Any) -> None:
        if self._failure is not None:
            return
        try:
            getattr(self._client, method)(*args)
        except Exception as error:  # raise_failure raises it
            self._failure = error
