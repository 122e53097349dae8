"""The order of work on the device when a sender reads what the source has gathered."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor, nn

from quatro_ray.weight_sync.zero_source import Streams, ZeroWeightSource


class Device(Streams):
    """Records what it is told; `unfinished` are the tensors that another stream must not read yet."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.unfinished: set[int] = set()

    def finish(self, tensors: Iterable[Tensor]) -> None:
        self.calls.append("finish")
        self.unfinished -= {id(tensor) for tensor in tensors}

    def lend(self, tensor: Tensor) -> None:
        self.calls.append("lend")


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def source(device: Device) -> ZeroWeightSource:
    layers = nn.ModuleList(nn.Linear(3, 2) for _ in range(2))

    def convert(layer: dict[str, Tensor]) -> dict[str, Tensor]:
        device.calls.append("convert")
        made = {name: tensor * 2 for name, tensor in layer.items()}
        device.unfinished |= {id(tensor) for tensor in made.values()}
        return made

    return ZeroWeightSource({f"layers.{name}": p for name, p in layers.named_parameters()}, convert, device)


def test_a_tensor_is_written_before_it_is_handed_out(source: ZeroWeightSource, device: Device) -> None:
    with source.whole_pass():
        assert device.calls == ["finish"]  # before the pass, for what the optimiser has written
        for name, tensor in source:
            assert id(tensor) not in device.unfinished, name
            assert device.calls[-1] == "lend"
    assert device.calls == ["finish"] + ["convert", "finish", "lend", "lend"] * 2


def test_nothing_is_done_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: pytest.fail("there is no stream"))
    tensor = torch.ones(2)
    Streams().finish([tensor])
    Streams().lend(tensor)


def test_the_rest_of_a_pass_is_iterated_after_an_error(source: ZeroWeightSource, device: Device) -> None:
    with pytest.raises(RuntimeError, match="the sender failed"), source.whole_pass():
        next(iter(source))
        raise RuntimeError("the sender failed")
    assert device.calls.count("convert") == 2
