"""Chains of thought whose errors add up: each state follows from the one before, and the last one is the answer.

A prompt holds increments a and b and a state s0, each one of 19 symbols. The response is s1 ... sn and eos, in which a
and b are added in turn, modulo 19. One wrong step spoils the answer unless later ones repair it.
"""

from __future__ import annotations

import torch
from torch import Tensor

NUM_SYMBOLS = 19
"""In the study; every function takes another number. The end of a response is the symbol after the last."""
EOS = NUM_SYMBOLS
_LIKELIEST, _UNLIKELIEST = 0.85, 0.03
"""The shares of demonstrations without a wrong step, for the first and the last symbol as increment a."""


def all_prompts(num_symbols: int = NUM_SYMBOLS) -> Tensor:
    """Return every prompt (a, b, s0), int64 [n, 3]."""
    return torch.cartesian_prod(*[torch.arange(num_symbols)] * 3)


def chains(prompts: Tensor, num_states: int, shifts: Tensor | int = 0, *, num_symbols: int = NUM_SYMBOLS) -> Tensor:
    """Return responses [n, num_states + 1] to prompts [n, 3], eos included.

    Args:
        prompts: int64 [n, 3].
        num_states: an even number.
        shifts: by how much each step is wrong, int64 [n, num_states]. A chain continues from its wrong state.
        num_symbols: the modulus.
    """
    increments = prompts[:, :2].repeat(1, num_states // 2)
    states = (prompts[:, 2:] + (increments + shifts).cumsum(1)) % num_symbols
    return torch.cat([states, torch.full((len(prompts), 1), num_symbols)], dim=1)


def success_rates(prompts: Tensor, num_symbols: int = NUM_SYMBOLS) -> Tensor:
    """Return the probability [n] that a demonstration has no wrong step. Its logarithm is linear in increment a."""
    ends = torch.tensor([_LIKELIEST, _UNLIKELIEST]).log()
    return torch.lerp(ends[0], ends[1], prompts[:, 0] / (num_symbols - 1)).exp()


def demonstrations(
    prompts: Tensor, num_states: int, generator: torch.Generator, *, num_symbols: int = NUM_SYMBOLS
) -> Tensor:
    """Return chains [n, num_states + 1] in which each step is wrong with a probability set by the prompt.

    A wrong state is uniformly random: RL unlearns one kind of error, such as one too much, in half as many steps.
    """
    error_rates = 1 - success_rates(prompts, num_symbols) ** (1 / num_states)
    shape = (len(prompts), num_states)
    wrong = torch.rand(shape, generator=generator) < error_rates[:, None]
    shifts = torch.randint(1, num_symbols, shape, generator=generator)
    return chains(prompts, num_states, torch.where(wrong, shifts, 0), num_symbols=num_symbols)


def ends_right(responses: Tensor, answers: Tensor) -> Tensor:
    """Return 1 for each of responses [Q, G, T] whose last state and eos are those of answers [Q, T], in their place."""
    return (responses[..., -2:] == answers[:, None, -2:]).all(-1).double()
