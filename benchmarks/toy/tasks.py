"""Questions as tensors. Shape letters: Q queries, G rollouts, P prompt tokens, T response tokens."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import reasoning_gym
import torch
from torch import Tensor

from benchmarks.toy import chain
from quatro_ray.config import ChainSumSourceConfig
from quatro_ray.data.reasoning_gym import chain_sum

NUM_HELD_OUT = 128
_PALINDROME = 6
"""Number of letters: three pairs, so that up to six answers are correct."""
_EOS = "$"
_WRONG_ANSWER_SHARE = 0.3
_CHAINS = {"chain_60": 60, "chain_250": 250}
"""Number of states by task."""

Rewards = Callable[[Tensor, Tensor], Tensor]
Demonstrate = Callable[["Task", Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class WarmUp:
    """The training of a task's starting policy on demonstrations."""

    demonstrate: Demonstrate
    """Map rows int64 [n] of the task's prompts to responses [n, T], some of them wrong."""
    num_demonstrations: int
    """Number of demonstrations in each step."""
    num_steps: int
    target: float | None = None
    """Stop at this share of correct samples; if None, train for all steps, with a learning rate that falls to zero."""


@dataclass(frozen=True)
class Task:
    """A task. Prompts are int64 [n, P]; answers are int64 [n, T], padded with eos."""

    prompts: Tensor
    answers: Tensor
    held_out_prompts: Tensor
    held_out_answers: Tensor
    vocabulary: int
    eos: int
    rewards: Rewards
    """Map responses [Q, G, T] and answers [Q, T] to float64 [Q, G].

    The reward is 1 exactly if the library's scorer gives 1, or the last state of a chain is right.
    """
    warm_up: WarmUp
    num_queries: int = 12
    """Queries of an RL step."""

    @property
    def max_response_tokens(self) -> int:
        return self.answers.shape[1]


def is_answer(responses: Tensor, answers: Tensor) -> Tensor:
    """Return 1 for each response that equals the answer, eos included."""
    return (responses == answers[:, None]).all(-1).double()


def is_palindrome_of_letters(responses: Tensor, answers: Tensor) -> Tensor:
    """Return 1 for each response that is a palindrome of exactly the answer's letters."""
    letters, wanted = responses[..., :_PALINDROME], answers[:, None, :_PALINDROME]
    same_letters = (letters.sort(-1).values == wanted.sort(-1).values).all(-1)
    ends = (responses[..., _PALINDROME:] == answers[:, None, _PALINDROME:]).all(-1)
    return (same_letters & ends & (letters == letters.flip(-1)).all(-1)).double()


def answer_or_another(task: Task, rows: Tensor, generator: torch.Generator) -> Tensor:
    """Return the answer [n, T] of each row or, for a share of them, that of a random row."""
    others = torch.randint(len(task.prompts), rows.shape, generator=generator)
    wrong = torch.rand(rows.shape, generator=generator) < _WRONG_ANSWER_SHARE
    return task.answers[torch.where(wrong, others, rows)]


@cache
def make_task(name: str) -> Task:
    """Return a task by its name.

    `addition` of two two-digit terms and `palindrome` from given letters are tasks of reasoning-gym. `chain_60` and
    `chain_250` are chains of thought of that many states.
    """
    return _make_chain(_CHAINS[name]) if name in _CHAINS else _make_library_task(name)


def _make_chain(num_states: int) -> Task:
    prompts = chain.all_prompts()
    prompts = prompts[torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0))]
    answers = chain.chains(prompts, num_states)

    def demonstrate(task: Task, rows: Tensor, generator: torch.Generator) -> Tensor:
        return chain.demonstrations(task.prompts[rows], num_states, generator)

    long = num_states > 60
    warm_up = WarmUp(demonstrate, num_demonstrations=3000 // num_states, num_steps=8000 if long else 5000)
    n = NUM_HELD_OUT
    vocabulary = chain.NUM_SYMBOLS + 1
    num_queries = 6 if long else 12
    return Task(
        prompts[n:],
        answers[n:],
        prompts[:n],
        answers[:n],
        vocabulary,
        chain.EOS,
        chain.ends_right,
        warm_up,
        num_queries,
    )


def _make_library_task(name: str) -> Task:
    pairs, scorer = {"addition": (_addition, is_answer), "palindrome": (_palindrome, is_palindrome_of_letters)}[name]
    rows = pairs()
    random.Random(0).shuffle(rows)
    symbols = sorted({character for row in rows for character in "".join(row)} | {_EOS})
    index = {symbol: i for i, symbol in enumerate(symbols)}
    answer_length = max(len(answer) for _, answer in rows) + 1

    def encode(texts: list[str]) -> Tensor:
        return torch.tensor([[index[character] for character in text] for text in texts])

    prompts = encode([prompt for prompt, _ in rows])
    answers = encode([answer.ljust(answer_length, _EOS) for _, answer in rows])
    n = NUM_HELD_OUT
    warm_up = WarmUp(answer_or_another, num_demonstrations=128, num_steps=6000, target=0.25)
    return Task(prompts[n:], answers[n:], prompts[:n], answers[:n], len(symbols), index[_EOS], scorer, warm_up)


def _addition() -> list[tuple[str, str]]:
    config = ChainSumSourceConfig(kind="chain_sum", min_digits=2, max_digits=2, num_questions=6000)
    rows = [(q.prompt, q.answer) for q in chain_sum(config, "addition").queries]
    random.Random(0).shuffle(rows)
    return rows[NUM_HELD_OUT:] + rows[:NUM_HELD_OUT]  # the order in which the committed figures were made


def _palindrome() -> list[tuple[str, str]]:
    items = reasoning_gym.create_dataset(
        "palindrome_generation", size=6000, seed=0, min_length=_PALINDROME, max_length=_PALINDROME
    )
    found = {"".join(item["metadata"]["letters"]) + "=": item["metadata"]["generated_palindrome"] for item in items}
    return sorted(found.items())
