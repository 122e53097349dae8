"""The adapter of a vLLM engine: it is loaded from a folder on the engine's node, in place of the version before."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quatro_ray.config.lora import MAX_RANKS_OF_VLLM, LoraConfig
from quatro_ray.engines.temporary_folder import TemporaryFolder

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM

_ID = 1
_FILE = "adapter_model.safetensors"


class EngineAdapter:
    """The one adapter that all requests of an engine use.

    All requests name it from the start on, when it changes nothing, so that they continue with the versions that come
    later.

    Args:
        lora: that of the learner.
    """

    def __init__(self, lora: LoraConfig) -> None:
        self._lora = lora
        self._folder = TemporaryFolder("quatro_ray-adapter-")
        config = {"peft_type": "LORA", "r": lora.rank, "lora_alpha": lora.alpha, "use_rslora": lora.use_rslora}
        path = self._folder.path / "adapter_config.json"
        path.write_text(json.dumps(config | {"target_modules": []}))

    def engine_args(self) -> dict[str, Any]:
        """Return the arguments of an engine that has an adapter; vLLM makes room for certain ranks."""
        room = next(rank for rank in MAX_RANKS_OF_VLLM if rank >= self._lora.rank)
        return {"enable_lora": True, "max_loras": 1, "max_lora_rank": room}

    def request(self, load_inplace: bool = False) -> LoRARequest:
        """Return what names the adapter in a call of vLLM; with `load_inplace` its files are read again."""
        from vllm.lora.request import LoRARequest

        return LoRARequest("policy", _ID, str(self._folder.path), load_inplace=load_inplace)

    async def start(self, llm: AsyncLLM, model_path: str) -> None:
        """Load an adapter that changes nothing; vLLM refuses one without tensors.

        Raises:
            ConfigError: the model cannot have these adapters.
        """
        from quatro_ray.engines.lora import untrained

        self.receive(await asyncio.to_thread(untrained, model_path, self._lora))
        await self.install(llm)

    def receive(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep the tensors of a new version beside those in use.

        Args:
            tensors: by their names in peft's files.
        """
        from safetensors.torch import save_file

        save_file(dict(tensors), self._folder.path / f"{_FILE}.received")

    async def install(self, llm: AsyncLLM) -> None:
        """Let the engine, which is paused or idle, load what was received.

        Raises:
            FileNotFoundError: nothing was received since the last call.
        """
        path = self._folder.path / _FILE
        os.replace(f"{path}.received", path)
        await llm.add_lora(self.request(load_inplace=True))

    def close(self) -> None:
        """Delete the files."""
        self._folder.close()
