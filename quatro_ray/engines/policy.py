"""The learner's policy model, which maps packed tokens to log-probs of their targets; and its export.

Shape letters: N tokens of a packed row.
"""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from quatro_ray.engines.logprob_head import LogprobHead

_PREFIX = "causal_lm."
"""Prefix of parameter names in DeepSpeed and its checkpoints."""


class PolicyModel(nn.Module):
    """A causal language model whose head returns log-probs and entropies instead of logits.

    Args:
        temperature: that of the sampling.
        chunk_tokens: most tokens whose logits exist at a time.
    """

    def __init__(
        self, path: str, *, dtype: torch.dtype, attn_implementation: str, temperature: float, chunk_tokens: int
    ) -> None:
        super().__init__()
        self.causal_lm = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=attn_implementation
        )
        self.causal_lm.lm_head = LogprobHead(self.causal_lm.lm_head, temperature, chunk_tokens)

    def forward(self, token_ids: Tensor, position_ids: Tensor, target_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probs of the targets, float32 [N], and entropies, float32 [N], both in nats.

        Args:
            token_ids: int64 [N], inputs.
            position_ids: int64 [N]. A position that does not follow the one before it starts a new sequence;
                transformers keeps attention within each sequence.
            target_ids: int64 [N].
        """
        decoder = self.causal_lm.get_decoder()
        output = decoder(input_ids=token_ids[None], position_ids=position_ids[None], use_cache=False)
        result: tuple[Tensor, Tensor] = self.causal_lm.lm_head(output.last_hidden_state[0], target_ids)
        return result

    def checkpoint_names(self) -> dict[str, nn.Parameter]:
        """Return parameters by name in a Hugging Face checkpoint; a tied head appears once, as the embedding."""
        return {name.removeprefix(_PREFIX): p for name, p in self.named_parameters()}


def export(model: PolicyModel, state: dict[str, Tensor], source: str, path: Path) -> None:
    """Write weights, configuration and tokenizer in the format that transformers and vLLM load.

    Args:
        model: gives the configuration; its own weights are not read.
        state: full tensors by checkpoint name.
        source: folder or hub name of the starting policy, whose tokenizer is copied.
        path: folder to write, which is created if it does not exist.
    """
    from safetensors.torch import save_file

    path.mkdir(parents=True, exist_ok=True)
    model.causal_lm.config.save_pretrained(path)
    if model.causal_lm.generation_config is not None:
        model.causal_lm.generation_config.save_pretrained(path)
    save_file({k: v.contiguous() for k, v in state.items()}, path / "model.safetensors", metadata={"format": "pt"})
    AutoTokenizer.from_pretrained(source).save_pretrained(path)


def convert_checkpoint(checkpoints: Path, tag: str, source: str | Path, path: Path) -> None:
    """Convert the ZeRO shards of a checkpoint to a folder like that of `export`.

    Args:
        checkpoints: folder of the checkpoints.
        tag: name of the checkpoint in it.
        source: an export of the same model, for its configuration and tokenizer.
        path: folder to write, which is created if it does not exist.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    with redirect_stdout(io.StringIO()):  # DeepSpeed's converter prints its progress
        state = get_fp32_state_dict_from_zero_checkpoint(str(checkpoints), tag=tag)
    model.load_state_dict({name.removeprefix(_PREFIX): tensor for name, tensor in state.items()})
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(source).save_pretrained(path)
