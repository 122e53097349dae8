"""A reward model behind vLLM's pooling interface: one logit for a prompt with its response."""

from __future__ import annotations

import asyncio
import math
import uuid
from typing import TYPE_CHECKING, Any, Literal

from quatro_ray.config import ModelRewardConfig
from quatro_ray.data.chat_template import encode_conversation
from quatro_ray.engines.engine_args import cpu_args
from quatro_ray.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig
    from vllm.v1.engine.async_llm import AsyncLLM

_SUFFIX = "ForSequenceClassification"


class RewardModelEngine:
    """One AsyncLLM. All methods run on one event loop; concurrent calls share batches."""

    def __init__(self, config: ModelRewardConfig, *, device: Literal["cpu", "cuda"]) -> None:
        self._config = config
        self._device = device
        self._llm: AsyncLLM | None = None

    @property
    def llm(self) -> AsyncLLM:
        """The engine of vLLM.

        Raises:
            RuntimeError: the engine is not running, because `start` was not called or `shutdown` was.
        """
        if self._llm is None:
            raise RuntimeError("start() must be called first")
        return self._llm

    async def start(self) -> None:
        """Load the model.

        Raises:
            ConfigError: the model does not give exactly one score to a text.
        """
        from transformers import AutoConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        _check(await asyncio.to_thread(AutoConfig.from_pretrained, self._config.path), self._config)
        self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**self._engine_args()))

    def _engine_args(self) -> dict[str, Any]:
        config = self._config
        args: dict[str, Any] = {
            "model": config.path,
            "runner": "pooling",
            "convert": "classify",
            "dtype": config.dtype,
            "max_model_len": config.max_tokens,
            "disable_log_stats": True,
        }
        if self._device == "cpu":
            return args | cpu_args(config.kv_cache_gib)
        return args | {"gpu_memory_utilization": config.gpu_memory_utilization}

    async def score(self, prompt: str, response: str) -> float:
        """Return the logit of the model's label after the last token: unbounded, and higher is better.

        A chat is rendered with the reward model's own template. A text longer than max_tokens is cut at its
        beginning, because the end of a response says most about it.

        Raises:
            TimeoutError: vLLM did not answer within timeout_s; the request is aborted.
            ValueError: prompt and response have no tokens, or the template refuses the messages.
            RuntimeError: the logit is not finite.
        """
        token_ids = encode_conversation(self.llm.get_tokenizer(), prompt, response)[-self._config.max_tokens :]
        if not token_ids:
            raise ValueError("prompt and response must have at least one token together")
        async with asyncio.timeout(self._config.timeout_s):
            logit = await self._logit(token_ids)
        if not math.isfinite(logit):
            raise RuntimeError(f"the reward model's logit is {logit}; float16 overflows in some models, use bfloat16")
        return logit

    async def _logit(self, token_ids: list[int]) -> float:
        from vllm import PoolingParams

        # by default vLLM applies a sigmoid, which saturates: all good answers would have a reward of 1
        params = PoolingParams(task="classify", use_activation=False)
        async for output in self.llm.encode({"prompt_token_ids": token_ids}, params, uuid.uuid4().hex):
            if output.finished:
                return float(output.outputs.data.item())
        raise RuntimeError("vLLM ended a request without a final output")

    async def shutdown(self) -> None:
        """End the engine's processes; a second call does nothing."""
        if self._llm is not None:
            await asyncio.to_thread(self._llm.shutdown)
            self._llm = None


def _check(model: PretrainedConfig, config: ModelRewardConfig) -> None:
    """Raise ConfigError unless the model has a score head with one label.

    Without a score head vLLM would not fail: it would make one from weights that were never trained for it.
    """
    architectures = model.architectures or []
    if not any(name.endswith(_SUFFIX) for name in architectures):
        raise ConfigError(f"path={config.path!r} must be a model …{_SUFFIX}, but its config.json names {architectures}")
    if model.num_labels != 1:
        raise ConfigError(f"path={config.path!r} must be a model with one label; it has {model.num_labels}")
    positions = getattr(model, "max_position_embeddings", config.max_tokens)
    if config.max_tokens > positions:
        raise ConfigError(f"max_tokens={config.max_tokens} must be at most the model's {positions} positions: lower it")
