"""The `model` section: the model that is trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from quatro_ray.config.base import Section
from quatro_ray.config.paths import FolderOrName


class WarmupConfig(Section):
    """Supervised training of the tiny model before RL, on data.warmup or data.train."""

    target_pass_rate: float = Field(0.33, gt=0, lt=1)
    """Stop when this share of samples on held-out questions is correct."""
    max_steps: int = Field(4000, ge=1)
    """Optimiser steps after which the warm-up stops in any case."""
    batch_size: int = Field(128, ge=1)
    """Demonstrations per optimiser step."""
    learning_rate: float = Field(4e-3, gt=0)
    """Learning rate of the warm-up; independent of learner.learning_rate."""
    wrong_answer_share: float = Field(0.0, ge=0, lt=1)
    """Share of demonstrations with the answer of another question. Like imperfect human data, it leaves a policy that
    knows more than it shows, which RL brings out in a short run."""


class TinyModelConfig(Section):
    """A Qwen2-architecture model with a character tokenizer, made from scratch; needs no download."""

    kind: Literal["tiny"]
    num_layers: int = Field(2, ge=1)
    """Transformer layers."""
    hidden_size: int = Field(64, ge=16)
    """Width of the residual stream; a multiple of 32 * num_heads."""
    num_heads: int = Field(2, ge=1)
    """Attention heads per layer."""
    warmup: WarmupConfig = WarmupConfig()
    """The warm-up, without which random weights would earn no reward."""

    def broken_rules(self) -> Iterator[str]:
        """Yield a line if hidden_size does not suit the number of attention heads."""
        if self.hidden_size % (32 * self.num_heads):
            yield (
                f"hidden_size={self.hidden_size} must be a multiple of 32*num_heads={32 * self.num_heads}, because "
                "vLLM's attention on CPU takes heads of 32, 64, …; change one of the two"
            )


class PretrainedModelConfig(Section):
    """A causal language model in Hugging Face format, from a folder or the hub."""

    kind: Literal["pretrained"]
    path: FolderOrName
    """Folder, or name on the hub."""
    num_parameters: int | None = Field(None, ge=1)
    """Number of weights, for the memory estimate of `quatro-ray plan`. null: read from the folder if there is one."""


ModelConfig = Annotated[TinyModelConfig | PretrainedModelConfig, Field(discriminator="kind")]
