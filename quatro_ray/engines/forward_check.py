"""Measures whether the learner's log-probs and gradients are the model's own, alone and packed.

Nothing here knows an architecture by name: a model is trained if its numbers agree, and refused if they do not.
Shape letters: T tokens of a sequence, N tokens of all sequences, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor, nn

from quatro_ray.errors import ConfigError
from quatro_ray.types import RowLayout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from quatro_ray.engines.policy import PolicyModel

_LENGTHS = (23, 5, 40)
"""Longer than the convolutions of state-space layers, and uneven, so that padding is tried too."""
_MAX_NATS = {torch.float32: 2e-3, torch.bfloat16: 0.2}
"""Largest difference of a log-prob that rounding explains, by the dtype of the weights."""
_MAX_INFLUENCE_NATS = {torch.float32: 1e-4, torch.bfloat16: 1e-3}
"""Largest change of a log-prob when another sequence of the same batch changes, and all shapes stay the same."""
_MAX_GRADIENT = {torch.float32: 1e-2, torch.bfloat16: 0.1}
"""Largest relative difference of a gradient that rounding explains."""


@dataclass(frozen=True)
class Result:
    """Log-probs of the sequences, and their gradients.

    Attributes:
        logprobs: float32 [N], nats.
        gradients: that of a weighted sum of log-probs, for the embedded tokens [N, D] and the head's weight [V, D].
    """

    logprobs: Tensor
    gradients: tuple[Tensor, ...]


@dataclass(frozen=True)
class Difference:
    """How far two results are apart.

    Attributes:
        nats: largest absolute difference of a log-prob.
        gradient: largest relative difference of a gradient, by its norm.
        influence: largest change of a log-prob when another sequence changes, nats; 0 for sequences that are alone.
    """

    nats: float
    gradient: float
    influence: float = 0.0

    @classmethod
    def between(cls, one: Result, other: Result, influence: float = 0.0) -> Difference:
        """Compare two results of the same sequences."""
        gradients = [_relative(a, b) for a, b in zip(one.gradients, other.gradients, strict=True)]
        return cls(float((one.logprobs - other.logprobs).abs().max()), max(gradients), influence)

    def is_rounding(self, dtype: torch.dtype) -> bool:
        """Tell whether rounding in `dtype` explains the difference; NaN is never rounding."""
        return (
            self.nats <= _MAX_NATS[dtype]
            and self.gradient <= _MAX_GRADIENT[dtype]
            and self.influence <= _MAX_INFLUENCE_NATS[dtype]
        )

    def __str__(self) -> str:
        return f"{max(self.nats, self.influence):.2g} nats, gradients by {self.gradient:.1%}"


class ForwardCheck:
    """Compares a policy with the model it is made of.

    The model is measured when this is created, which has to be before its head is replaced.

    Args:
        causal_lm: a model from transformers.
        name: how messages name the model, as `model.path=...`.
        temperature: that of the sampling.

    Raises:
        ConfigError: the model's own forward fails.
    """

    def __init__(self, causal_lm: PreTrainedModel, name: str, temperature: float) -> None:
        self.name = name
        self._embeddings = causal_lm.get_input_embeddings()
        self._head: Tensor = causal_lm.get_output_embeddings().weight
        self._dtype = self._head.dtype
        vocabulary = self._embeddings.weight.shape[0]
        random = torch.Generator().manual_seed(0)
        device = self._head.device
        self._sequences = [torch.randint(vocabulary, (n,), generator=random).to(device) for n in _LENGTHS]
        self._other_first = torch.randint(vocabulary, _LENGTHS[:1], generator=random).to(device)
        self._coefficients = torch.randn(sum(_LENGTHS), generator=random).to(device)
        with self._explained("its own forward pass fails"):
            self._own = self._measure(lambda: _own_logprobs(causal_lm, self._sequences, temperature))

    def layout(self, policy: PolicyModel) -> tuple[RowLayout, str]:
        """Return the layout in which the policy's results are the model's own, and a line that says what was found.

        The layout "packed" is preferred. `policy.row_layout` is set to what is returned.

        Raises:
            ConfigError: the policy differs from the model in every layout, or its forward pass fails.
        """
        with self._explained("the learner cannot compute its log-probs"):
            alone = Difference.between(self._measure(lambda: self._each_alone(policy)), self._own)
            if not alone.is_rounding(self._dtype):
                raise ConfigError(
                    f"{self.name}: the learner's log-probs differ from the model's own ({alone}), because its head "
                    "does more than engines/logprob_head.py knows; choose another model"
                )
            found: dict[RowLayout, Difference] = {}
            for layout in get_args(RowLayout):
                policy.row_layout = layout
                together = self._measure(lambda: policy(*_inputs(self._sequences))[0])
                found[layout] = Difference.between(together, self._own, self._influence(policy))
                if found[layout].is_rounding(self._dtype):
                    return layout, _line(self.name, found)
        raise ConfigError(
            f"{self.name}: sequences in one batch change each other ({found['padded']}), so it cannot be trained; "
            "choose another model"
        )

    def reason(self, refusal: ConfigError) -> str:
        """Return what a refusal by this class says, without the model's name and the advice to choose another."""
        return str(refusal).removeprefix(f"{self.name}: ").removesuffix("; choose another model")

    def _each_alone(self, policy: PolicyModel) -> Tensor:
        return torch.cat([policy(*_inputs([sequence]))[0] for sequence in self._sequences])

    @torch.no_grad()
    def _influence(self, policy: PolicyModel) -> float:
        """Return by how much log-probs change, nats, if other tokens stand in the first sequence.

        Rounding hardly shows here, because all shapes stay the same, so that small leaks do, even in bfloat16.
        """
        first = len(self._other_first)
        one = policy(*_inputs(self._sequences))[0][first:]
        other = policy(*_inputs([self._other_first, *self._sequences[1:]]))[0][first:]
        return float((one - other).abs().max())

    def _measure(self, logprobs_of: Callable[[], Tensor]) -> Result:
        """Call the function, which passes each token through the embeddings once, and differentiate what it returns."""
        embedded: list[Tensor] = []

        def keep(_: nn.Module, __: object, output: Tensor) -> Tensor:
            embedded.append(output.detach().requires_grad_())
            return embedded[-1]

        hook = self._embeddings.register_forward_hook(keep)
        is_trained = self._head.requires_grad  # not with adapters
        self._head.requires_grad_()
        try:
            logprobs = logprobs_of()
            # the targets are the tokens themselves, so that each one has a log-prob
            total = (logprobs * self._coefficients).sum()
            *of_tokens, of_head = torch.autograd.grad(total, [*embedded, self._head])
        finally:
            hook.remove()
            self._head.requires_grad_(is_trained)
        return Result(logprobs.detach(), (_without_padding(of_tokens).float(), of_head.float()))

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        """Turn an error of a model's own code into one line."""
        try:
            yield
        except ConfigError:
            raise
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            raise ConfigError(f"{self.name}: {what} ({reason}); choose another model") from error


def _own_logprobs(causal_lm: nn.Module, sequences: list[Tensor], temperature: float) -> Tensor:
    """Return log-probs [N] from the model's own logits, one sequence at a time."""
    found = []
    for sequence in sequences:
        logits = causal_lm(input_ids=sequence[None], use_cache=False).logits[0]
        found.append(torch.log_softmax(logits.float() / temperature, -1).gather(1, sequence[:, None])[:, 0])
    return torch.cat(found)


def _inputs(sequences: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return token, position and target ids, each [N]."""
    tokens = torch.cat(sequences)
    return tokens, torch.cat([torch.arange(len(s), device=s.device) for s in sequences]), tokens


def _without_padding(gradients: list[Tensor]) -> Tensor:
    """Return [N, D], whatever rows the tokens stood in."""
    if len(gradients) == 1 and len(gradients[0]) == len(_LENGTHS):
        return torch.cat([row[:length] for row, length in zip(gradients[0], _LENGTHS, strict=True)])
    return torch.cat([g.flatten(0, -2) for g in gradients])


def _relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def _line(name: str, found: dict[RowLayout, Difference]) -> str:
    if "padded" in found:
        return (
            f"{name}: packed sequences change each other ({found['packed']}), so each one has a row of its own, which "
            "takes more memory and time"
        )
    return f"{name}: packed sequences agree with the model's own forward pass ({found['packed']})"
