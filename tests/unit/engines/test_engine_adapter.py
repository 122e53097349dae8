"""The files of an engine's adapter: one version is in use while the next one waits."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from benchmarks.models import make
from quatro_ray.config import LoraConfig
from quatro_ray.engines.engine_adapter import EngineAdapter


class Llm:
    """Reads the adapter as vLLM does."""

    def __init__(self) -> None:
        self.loaded: list[dict[str, torch.Tensor]] = []

    async def add_lora(self, request: Any) -> None:
        assert request.load_inplace and request.lora_int_id == 1
        self.loaded.append(load_file(Path(request.lora_path) / "adapter_model.safetensors"))


def install(adapter: EngineAdapter, llm: Any) -> None:
    asyncio.run(adapter.install(llm))


def test_a_version_is_used_from_its_installation_on(tmp_path: Path) -> None:
    adapter, llm = EngineAdapter(LoraConfig(rank=4, sync="adapter")), Llm()
    make("Qwen2").save_pretrained(tmp_path)
    asyncio.run(adapter.start(llm, str(tmp_path)))
    adapter.receive({"a": torch.ones(2)})
    folder = Path(adapter.request().lora_path)
    assert len(load_file(folder / "adapter_model.safetensors")) == 28  # still that of the starting policy
    install(adapter, llm)
    first, second = llm.loaded
    assert not any(tensor.any() for tensor in first.values()) and list(second) == ["a"]
    q_proj = "base_model.model.model.layers.1.self_attn.q_proj"
    assert first[f"{q_proj}.lora_A.weight"].shape == (4, 128) and first[f"{q_proj}.lora_B.weight"].shape == (128, 4)
    with pytest.raises(FileNotFoundError):
        install(adapter, llm)
    assert not adapter.request().load_inplace  # requests would read the files in each step
    adapter.close()
    assert not folder.exists()


def test_vllm_reads_the_configuration() -> None:
    from vllm.lora.peft_helper import PEFTHelper

    adapter = EngineAdapter(LoraConfig(rank=4, alpha=8, use_rslora=True, sync="adapter"))
    read = PEFTHelper.from_local_dir(adapter.request().lora_path, 512)
    assert (read.r, read.lora_alpha, read.vllm_lora_scaling_factor) == (4, 8, 4.0)


@pytest.mark.parametrize(("rank", "room"), [(1, 1), (2, 8), (8, 8), (200, 256), (512, 512)])
def test_room_for_the_rank(rank: int, room: int) -> None:
    assert EngineAdapter(LoraConfig(rank=rank, sync="adapter")).engine_args()["max_lora_rank"] == room


def test_ranks_without_room_are_refused() -> None:
    with pytest.raises(ValidationError, match="rank=513 must be at most 512 with sync=adapter"):
        LoraConfig(rank=513, sync="adapter")
    assert LoraConfig(rank=513).rank == 513


def test_the_ranks_are_those_of_vllm() -> None:
    from typing import get_args

    from vllm.config.lora import MaxLoRARanks

    from quatro_ray.config.lora import MAX_RANKS_OF_VLLM

    assert get_args(MaxLoRARanks) == MAX_RANKS_OF_VLLM
