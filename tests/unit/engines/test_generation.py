"""An engine releases its old connection before a new one, unless it is in the middle of an update."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from quatro_ray.engines.generation import GenerationEngine
from tests.make import config


class Llm:
    """Records the calls of AsyncLLM."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        async def call(*args: object, **kwargs: object) -> None:
            self.calls.append(name)

        return call


@pytest.mark.parametrize("is_receiving", [False, True])
def test_an_old_connection_is_released_first_unless_vllm_would_refuse(is_receiving: bool) -> None:
    engine = GenerationEngine("model", config().generator, device="cpu", sync_backend="gloo", seed=0)
    llm: Any = Llm()
    engine._llm = llm

    async def run() -> None:
        if is_receiving:
            await engine.receive_weights()
        llm.calls.clear()
        await engine.init_weight_transfer_engine({})

    asyncio.run(run())
    released = [] if is_receiving else ["shutdown_weight_transfer_engine"]
    assert llm.calls == [*released, "init_weight_transfer_engine"]
