"""The `learner.lora` section: low-rank adapters in place of all weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from quatro_ray.config.base import Accepts, Section

MAX_RANKS_OF_VLLM = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks for which vLLM makes room; an adapter may have a lower one."""


def _targets(value: str | tuple[str, ...]) -> str | tuple[str, ...]:
    if value != "all-linear" and (isinstance(value, str) or not value):
        raise ValueError("must be all-linear, or a list of names of layers such as [q_proj, v_proj]")
    return value


class LoraConfig(Section):
    """Trains low-rank adapters (LoRA) beside frozen weights: W x becomes W x + (alpha/rank) B A x."""

    rank: int = Field(ge=1)
    """Rows of A and columns of B. 8 to 64 are usual; at most the narrowest target layer's width."""
    alpha: int = Field(32, ge=1)
    """Factor of the adapters: what they add is multiplied by alpha/rank, or with use_rslora by alpha/sqrt(rank)."""
    target_modules: Annotated[
        str | tuple[str, ...], AfterValidator(_targets), Accepts("all-linear or a list of strings")
    ] = "all-linear"
    """Linear layers that get an adapter, by the ends of their names, such as [q_proj, v_proj]. all-linear: all but the
    head."""
    use_rslora: bool = False
    """Divide alpha by the root of the rank, so that the size of the change does not fall with the rank."""
    sync: Literal["merged", "adapter"] = "merged"
    """Form in which engines get a policy. merged: all weights, with the adapters added to them. adapter: the adapters
    alone, which vLLM adds in each layer; less is sent, nothing is rounded, and engines are slower."""

    def broken_rules(self) -> Iterator[str]:
        """Yield a line if vLLM has no room for the rank."""
        if self.sync == "adapter" and self.rank > MAX_RANKS_OF_VLLM[-1]:
            yield f"rank={self.rank} must be at most {MAX_RANKS_OF_VLLM[-1]} with sync=adapter: lower it, or use merged"

    @property
    def scale(self) -> float:
        """The factor of what the adapters add."""
        return self.alpha / (self.rank**0.5 if self.use_rslora else self.rank)
