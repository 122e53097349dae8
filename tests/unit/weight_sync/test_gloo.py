"""Workers receive in the background what the trainer sends, and load nothing before all of it has arrived."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import ModuleSource

from quatro_ray.weight_sync import gloo
from quatro_ray.weight_sync.gloo import (
    GlooTrainerInitInfo,
    GlooTrainerWeightTransferEngine,
    GlooWeightTransferEngine,
    Layout,
)

TIMEOUT_S = 5.0


class Policy(nn.Module):
    """Tensors of two dtypes, of which one is a scalar."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        shapes = {"embedding": (7, 3), "first": (3, 5), "scale": (), "norm": (3,), "head": (4, 2)}
        for name, shape in shapes.items():
            dtype = torch.bfloat16 if name == "norm" else torch.float32
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator).to(dtype)))


class Model(nn.Module):
    """An engine's model, which only remembers what it loads."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[dict[str, Tensor]] = []

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.loaded.append(dict(weights))


class Failing(ModuleSource):
    """Fails when a part is sent."""

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        weights = super().__iter__()
        yield next(weights)
        raise RuntimeError("the gather failed")


class Client:
    """Connects the worker of one engine."""

    def __init__(self, worker: GlooWeightTransferEngine) -> None:
        self._worker = worker

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._worker.init_transfer_engine(self._worker.parse_init_info(init_info))


@pytest.fixture
def worker() -> GlooWeightTransferEngine:
    parallel = SimpleNamespace(data_parallel_index=0, world_size=1, rank=0)
    config: Any = SimpleNamespace(parallel_config=parallel, model_config=None)
    return GlooWeightTransferEngine(None, config, torch.device("cpu"), Model())


def connect(worker: GlooWeightTransferEngine, source: ModuleSource) -> GlooTrainerWeightTransferEngine:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    info = GlooTrainerInitInfo("127.0.0.1", port, world_size=2, timeout_s=TIMEOUT_S, rank=0)
    client: Any = Client(worker)
    return GlooTrainerWeightTransferEngine.trainer_init(info, client=client, source=source)


def loaded(worker: GlooWeightTransferEngine) -> list[dict[str, Tensor]]:
    assert isinstance(worker.model, Model)
    return worker.model.loaded


@pytest.mark.parametrize(("bucket_bytes", "num_buckets"), [(1, 5), (63, 5), (64, 4), (1 << 20, 3)])
def test_buckets_keep_order_dtype_and_size(
    monkeypatch: pytest.MonkeyPatch, bucket_bytes: int, num_buckets: int
) -> None:
    monkeypatch.setattr(gloo, "_BUCKET_BYTES", bucket_bytes)
    layout = Layout.of(ModuleSource(Policy(0)))
    buckets = list(layout.buckets())
    assert [name for bucket in buckets for name in layout.names[bucket]] == layout.names
    assert all(len(set(layout.dtype_names[bucket])) == 1 for bucket in buckets)
    assert len(buckets) == num_buckets


@pytest.mark.parametrize("bucket_bytes", [1, 150, 1 << 20])
def test_every_update_arrives_whole_and_is_loaded_at_its_end(
    worker: GlooWeightTransferEngine, monkeypatch: pytest.MonkeyPatch, bucket_bytes: int
) -> None:
    monkeypatch.setattr(gloo, "_BUCKET_BYTES", bucket_bytes)
    policy = Policy(0)
    trainer = connect(worker, ModuleSource(policy))
    for number in range(2):
        policy.load_state_dict(Policy(number).state_dict())
        worker.start_weight_update()
        worker.update_weights({})
        trainer.send_weights()
        assert len(loaded(worker)) == number
        worker.finish_weight_update()
        torch.testing.assert_close(loaded(worker)[number], policy.state_dict(), rtol=0, atol=0)


def test_a_transfer_that_fails_loads_nothing(worker: GlooWeightTransferEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gloo, "_BUCKET_BYTES", 1)
    trainer = connect(worker, Failing(Policy(0)))
    worker.update_weights({})
    with pytest.raises(RuntimeError, match="the gather failed"):
        trainer.send_weights()
    trainer.shutdown()
    with pytest.raises((RuntimeError, TimeoutError)):  # as the connection ends, or at its deadline
        worker.finish_weight_update()
    assert not loaded(worker)


def test_a_new_connection_replaces_a_transfer_that_was_begun(worker: GlooWeightTransferEngine) -> None:
    """As when another engine of the first connection did not begin to receive."""
    source = ModuleSource(policy := Policy(0))
    first = connect(worker, source)
    worker.update_weights({})
    second = connect(worker, source)
    first.shutdown()
    worker.update_weights({})
    second.send_weights()
    worker.finish_weight_update()
    torch.testing.assert_close(loaded(worker), [dict(policy.state_dict())], rtol=0, atol=0)


def test_calls_in_the_wrong_order_are_refused(worker: GlooWeightTransferEngine) -> None:
    with pytest.raises(RuntimeError, match="init_transfer_engine"):
        worker.update_weights({})
    with pytest.raises(RuntimeError, match="update_weights"):
        worker.finish_weight_update()
