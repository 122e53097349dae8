"""Transfer inside a GPU: ranks stay in step if an engine fails, and the buffer holds the largest tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm.distributed.weight_transfer.base import ParamMeta

from quatro_ray.weight_sync.engine_client import EngineClient
from quatro_ray.weight_sync.ipc import PatientClient
from quatro_ray.weight_sync.sender import largest_bytes


class Client:
    def __init__(self, fails_in: str = "") -> None:
        self.fails_in, self.calls = fails_in, []  # type: ignore[var-annotated]

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.fails_in:
            raise TimeoutError(name)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._call("init")

    def start_weight_update(self) -> None:
        self._call("start")

    def update_weights(self, update_info: Any) -> None:
        self._call("update")

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._call("finish")


def update(client: PatientClient) -> None:
    """The calls of vLLM's trainer end on rank 0, between which it meets the other ranks."""
    client.start_weight_update()
    client.update_weights({})
    client.update_weights({})
    client.finish_weight_update()


@pytest.mark.parametrize(("fails_in", "made"), [("start", 1), ("update", 2), ("finish", 4), ("", 4)])
def test_a_failure_is_raised_after_the_last_meeting(fails_in: str, made: int) -> None:
    inner = Client(fails_in)
    client = PatientClient(inner)
    update(client)
    assert len(inner.calls) == made
    if not fails_in:
        return client.raise_failure()
    with pytest.raises(TimeoutError, match=fails_in):
        client.raise_failure()
    inner.fails_in = ""
    update(client)  # the next update is not held back
    client.raise_failure()
    assert len(inner.calls) == made + 4


def test_a_connection_that_fails_raises_at_once() -> None:
    with pytest.raises(TimeoutError):
        PatientClient(Client("init")).init_weight_transfer_engine({})


class Source:
    def __init__(self, *shapes: tuple[int, ...]) -> None:
        self.shapes = shapes

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(str(i), torch.bfloat16, shape) for i, shape in enumerate(self.shapes)]


def test_the_buffer_holds_the_largest_tensor() -> None:
    assert largest_bytes(Source((8, 8), (152_064, 3584))) == 152_064 * 3584 * 2


def test_engines_that_need_no_ranks_are_told_none() -> None:
    told: list[dict[str, Any]] = []
    client = EngineClient(
        ["a", "b"], lambda engine, method, info: told.append(info), lambda futures, seconds: None,
        workers_per_engine=1, rendezvous_deadline_s=1, transfer_deadline_s=1, on_failure=print,
    )  # fmt: skip
    client.init_weight_transfer_engine({"packed": True})
    client.init_weight_transfer_engine({"rank_offset": 1})
    assert told == [{"packed": True}] * 2 + [{"rank_offset": 1}, {"rank_offset": 2}]
