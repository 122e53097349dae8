"""The model that is trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from quatro_ray.config.base import ModelPath, Section


class WarmupConfig(Section):
    """Supervised training of the tiny model, before RL, on data.train or data.warmup."""

    target_pass_rate: float = Field(0.33, gt=0, lt=1)
    """Stop when this share of samples on held-out questions is right."""
    max_steps: int = Field(4000, ge=1)
    """Stop here in any case."""
    batch_size: int = Field(128, ge=1)
    learning_rate: float = Field(4e-3, gt=0)
    wrong_answer_share: float = Field(0.0, ge=0, lt=1)
    """Share of demonstrations with the answer of another question: like imperfect human data, it leaves a
    policy that knows more than it shows, which RL brings out in a short run."""


class TinyModelConfig(Section):
    """A Qwen2-architecture model with a character tokenizer, made from scratch: needs no download."""

    kind: Literal["tiny"]
    num_layers: int = Field(2, ge=1)
    hidden_size: int = Field(64, ge=16)
    num_heads: int = Field(2, ge=1)
    warmup: WarmupConfig = WarmupConfig()

    @model_validator(mode="after")
    def _heads_divide(self) -> TinyModelConfig:
        if self.hidden_size % (32 * self.num_heads):
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of 32*num_heads={32 * self.num_heads} "
                "(vLLM's attention on CPU takes heads of 32, 64, …); change one of the two"
            )
        return self


class PretrainedModelConfig(Section):
    """A causal language model in Hugging Face format, from a folder or the hub."""

    kind: Literal["pretrained"]
    path: ModelPath
    """Folder, or name on the hub."""
    num_parameters: int | None = Field(None, ge=1)
    """For the memory estimate of `quatro-ray plan`; read from the folder where it can be."""


ModelConfig = Annotated[TinyModelConfig | PretrainedModelConfig, Field(discriminator="kind")]
