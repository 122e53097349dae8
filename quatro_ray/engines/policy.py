"""The learner's policy model, which maps packed tokens to log-probs of their targets; and its export.

Shape letters: N tokens of a packed row.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from quatro_ray.config.lora import LoraConfig
from quatro_ray.engines import varlen_attention
from quatro_ray.engines.logprob_head import LogprobHead, logit_transform
from quatro_ray.engines.lora import Adapters
from quatro_ray.engines.model_files import write_model
from quatro_ray.engines.sequence_parallel import SequenceGroup
from quatro_ray.engines.varlen_attention import VARLEN
from quatro_ray.types import RowLayout

varlen_attention.register()
_PREFIX = "causal_lm."
"""Prefix of parameter names in DeepSpeed and its checkpoints."""


class PolicyModel(nn.Module):
    """A causal language model whose head returns log-probs and entropies instead of logits.

    Args:
        causal_lm: a model from transformers; its head is replaced.
        temperature: that of the sampling.
        chunk_tokens: most tokens whose logits exist at a time.
        adapters: those of `causal_lm`; None if all its weights are trained.

    Attributes:
        row_layout: how the sequences of a batch reach the decoder (engines/forward_check.py decides).
        sequence_group: the ranks that share each row; None if this rank has it alone. All call `forward` with the
            whole row and get the whole result.
    """

    def __init__(
        self,
        causal_lm: PreTrainedModel,
        *,
        temperature: float,
        chunk_tokens: int,
        adapters: Adapters | None = None,
    ) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.adapters = adapters
        head = causal_lm.get_output_embeddings()
        transform = logit_transform(causal_lm.config.get_text_config())
        causal_lm.set_output_embeddings(LogprobHead(head, transform, temperature, chunk_tokens))
        self.row_layout: RowLayout = "packed"
        self.sequence_group: SequenceGroup | None = None

    def forward(
        self, token_ids: Tensor, position_ids: Tensor, target_ids: Tensor, counted: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return log-probs of the targets, float32 [N], and entropies, float32 [N], both in nats.

        Args:
            token_ids: int64 [N], inputs.
            position_ids: int64 [N]. Position 0 starts a new sequence.
            target_ids: int64 [N].
            counted: bool [N], the targets that go through the head; the results are 0 elsewhere. None: all.
        """
        if self.sequence_group is not None:
            return self._shared(self.sequence_group, token_ids, position_ids, target_ids, counted)
        packed = self.row_layout == "packed"
        hidden = self._packed(token_ids, position_ids) if packed else self._padded(token_ids, position_ids)
        return self._score(hidden, target_ids, counted)

    def _shared(
        self, group: SequenceGroup, token_ids: Tensor, position_ids: Tensor, target_ids: Tensor, counted: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Compute this rank's tokens of the row, and join the results of the group."""
        counted = torch.ones_like(token_ids, dtype=torch.bool) if counted is None else counted
        padding = (0, -len(token_ids) % group.size)  # a sequence of its own
        row = [functional.pad(values, padding) for values in (token_ids, position_ids, target_ids, counted)]
        tokens, positions, targets, counts = (group.own(values) for values in row)
        hidden = self._packed(tokens, positions, _lengths(row[1]))
        logprobs, entropy = (group.gather(values) for values in self._score(hidden, targets, counts))
        return logprobs[: len(token_ids)], entropy[: len(token_ids)]

    def _score(self, hidden: Tensor, target_ids: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor]:
        head = self.causal_lm.get_output_embeddings()
        if counted is None:
            result: tuple[Tensor, Tensor] = head(hidden, target_ids)
            return result
        at = counted.nonzero()[:, 0]
        logprobs, entropy = head(hidden[at], target_ids[at])
        zeros = torch.zeros(len(target_ids), dtype=torch.float32, device=hidden.device)
        return zeros.index_put((at,), logprobs), zeros.index_put((at,), entropy)

    def _packed(self, token_ids: Tensor, position_ids: Tensor, lengths_of_row: tuple[int, ...] | None = None) -> Tensor:
        """Return the last hidden states [N, D] of one row; the model keeps sequences apart by their positions.

        Args:
            token_ids: int64 [N].
            position_ids: int64 [N].
            lengths_of_row: tokens of each sequence, if the group has more of the row than these N tokens.
        """
        decoder = self.causal_lm.get_decoder()
        keywords: dict[str, Any] = {"position_ids": position_ids[None], "use_cache": False}
        if self.attention == VARLEN:
            keywords["sequence_lengths"] = lengths_of_row or _lengths(position_ids)
            keywords["sequence_group"] = self.sequence_group
        hidden: Tensor = decoder(input_ids=token_ids[None], **keywords).last_hidden_state[0]
        return hidden

    def _padded(self, token_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Return the last hidden states [N, D] of rows of one sequence each.

        Rows are padded on the right, which no causal model sees, so that no attention mask is needed.
        """
        starts = (position_ids == 0).nonzero()[:, 0]
        row = torch.cumsum(position_ids == 0, 0) - 1
        column = torch.arange(len(token_ids), device=token_ids.device) - starts[row]
        rows = token_ids.new_zeros(len(starts), int(column.max()) + 1)
        rows[row, column] = token_ids
        hidden: Tensor = self.causal_lm.get_decoder()(input_ids=rows, use_cache=False).last_hidden_state
        return hidden[row, column]

    @property
    def attention(self) -> str:
        """Return transformers' name of the attention that the layers call."""
        return str(self.causal_lm.config.get_text_config()._attn_implementation)

    @property
    def vocab_size(self) -> int:
        """Return the number of tokens that have an id."""
        return int(self.causal_lm.config.get_text_config().vocab_size)

    @contextmanager
    def at_temperature(self, temperature: float) -> Iterator[None]:
        """Compute log-probs at another temperature than that of the sampling."""
        head = self.causal_lm.get_output_embeddings()
        before, head.temperature = head.temperature, temperature
        try:
            yield
        finally:
            head.temperature = before

    def parameters_by_name(self) -> dict[str, nn.Parameter]:
        """Return parameters by their names in transformers; a tied head appears once, as the embedding."""
        return {name.removeprefix(_PREFIX): p for name, p in self.named_parameters()}

    def as_on_disk(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Do what the function of this name does; tensors of adapters are merged into the weights that they change."""
        return as_on_disk(self.causal_lm, self.adapters.merge(state) if self.adapters else state)


def _lengths(position_ids: Tensor) -> tuple[int, ...]:
    """Return the tokens of each sequence of a row."""
    starts = (position_ids == 0).nonzero()[:, 0].tolist()
    return tuple(end - start for start, end in pairwise([*starts, len(position_ids)]))


def convert_checkpoint(
    checkpoints: Path, tag: str, source: str | Path, path: Path, lora: LoraConfig | None = None
) -> None:
    """Convert the ZeRO shards of a checkpoint to a folder like that of an export.

    Args:
        checkpoints: folder of the checkpoints.
        tag: name of the checkpoint in it.
        source: the starting policy, for its other files and the weights that are not in the checkpoint.
        path: folder to write, which is created if it does not exist.
        lora: that of the run. The adapters are merged, as in an export.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    adapters = Adapters(model, lora) if lora else None
    with redirect_stdout(io.StringIO()):  # DeepSpeed's converter prints its progress
        saved = get_fp32_state_dict_from_zero_checkpoint(str(checkpoints), tag=tag)
    state = model.state_dict() | {name.removeprefix(_PREFIX): tensor for name, tensor in saved.items()}
    kept = {name: state[name] for name in [*dict(model.named_parameters()), *persistent_buffers(model)]}
    write_model(path, as_on_disk(model, adapters.merge(kept) if adapters else kept), source)


def as_on_disk(model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under the names and in the layout of `save_pretrained`, as files and vLLM have them.

    transformers keeps, for example, all experts of a layer in one tensor, and files have one for each expert.

    Args:
        model: the model whose tensors they are.
        state: whole tensors by their names in memory, at least those of one layer. Tensors on the meta device give
            names, dtypes and shapes alone.
    """
    converted: dict[str, Tensor] = revert_weight_conversion(model, state)
    return converted


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that belong into a file, such as the biases of a router that are not trained."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in parameters}
