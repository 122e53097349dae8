"""The policy as the learner sees it: packed tokens in, log-probs of the targets out."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from quatro_ray.engines.logprob_head import LogprobHead

_PREFIX = "causal_lm."
"""Of parameter names inside DeepSpeed and its checkpoints."""


class PolicyModel(nn.Module):
    """A causal language model whose head returns log-probs (and entropies) instead of logits."""

    def __init__(
        self, path: str, *, dtype: torch.dtype, attn_implementation: str, temperature: float, chunk_tokens: int
    ) -> None:
        super().__init__()
        self.causal_lm = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=attn_implementation
        )
        self.causal_lm.lm_head = LogprobHead(self.causal_lm.lm_head, temperature, chunk_tokens)

    def forward(self, token_ids: Tensor, position_ids: Tensor, target_ids: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [N] each → log-probs float32 [N], entropies float32 [N].

        Positions that do not go up by one start a new sequence: transformers keeps attention inside each.
        """
        decoder = self.causal_lm.get_decoder()
        output = decoder(input_ids=token_ids[None], position_ids=position_ids[None], use_cache=False)
        return self.causal_lm.lm_head(output.last_hidden_state[0], target_ids)

    def checkpoint_names(self) -> dict[str, nn.Parameter]:
        """Parameters by their name in a Hugging Face checkpoint; a tied head appears once, as the embedding."""
        return {name.removeprefix(_PREFIX): p for name, p in self.named_parameters()}


def export(model: PolicyModel, state: dict[str, Tensor], source: str, path: Path) -> None:
    """Writes weights, configuration and tokenizer so that `transformers` and vLLM load them.

    Args:
        state: full tensors by checkpoint name.
        source: where the model came from; its tokenizer is copied.
    """
    from safetensors.torch import save_file

    path.mkdir(parents=True, exist_ok=True)
    model.causal_lm.config.save_pretrained(path)
    if model.causal_lm.generation_config is not None:
        model.causal_lm.generation_config.save_pretrained(path)
    save_file({k: v.contiguous() for k, v in state.items()}, path / "model.safetensors", metadata={"format": "pt"})
    AutoTokenizer.from_pretrained(source).save_pretrained(path)


def convert_checkpoint(checkpoints: Path, tag: str, source: str | Path, path: Path) -> None:
    """ZeRO shards, read by DeepSpeed's own converter, to a folder like that of `export`.

    Args:
        source: an export of the same model, for its configuration and tokenizer.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    with redirect_stdout(io.StringIO()):  # it prints its progress
        state = get_fp32_state_dict_from_zero_checkpoint(str(checkpoints), tag=tag)
    model.load_state_dict({name.removeprefix(_PREFIX): tensor for name, tensor in state.items()})
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(source).save_pretrained(path)
