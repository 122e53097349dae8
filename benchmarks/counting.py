"""A task whose responses have uneven lengths, and a model of 4.9 million weights that knows it in part.

The prompt is a number and two letters, and the response counts down to zero, with the letters behind each number:
"002qx" asks for "001qx000qx". The number decides the length, so data with any distribution of lengths can be made. The
starting policy has seen demonstrations that sometimes leave numbers out.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quatro_ray.types import Query, Response

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_PROMPT_TOKENS = _TOKENS_PER_NUMBER = 5
FOLDER = Path("runs/counting")
START = FOLDER / "start"
_NUM_QUESTIONS = 3_000
_SKIP_RATE = 0.03
"""Probability that a demonstration leaves numbers out, for each number that it has."""
_WARMUP_STEPS, _WARMUP_TOKENS, _WARMUP_LEARNING_RATE = 400, 2_048, 2e-3


@dataclass(frozen=True)
class Lengths:
    """How long responses are: lognormal, cut at the longest.

    Attributes:
        median: response tokens, end of sequence included.
        sigma: standard deviation of the logarithm.
        longest: tokens.
    """

    median: int
    sigma: float
    longest: int

    def num_counted(self, rng: random.Random) -> int:
        """Return how many numbers a response has."""
        tokens = min(self.longest, rng.lognormvariate(0.0, self.sigma) * self.median)
        return max(1, int(tokens - 1) // _TOKENS_PER_NUMBER)


UNEVEN = Lengths(median=96, sigma=0.6, longest=256)
LONG_TAIL = Lengths(median=64, sigma=1.0, longest=512)


def counts_right(query: Query, response: Response) -> float:
    """Return 1 if the response is the answer."""
    return float(response.text == query.answer)


def _letters(rng: random.Random) -> str:
    return "".join(rng.choices(_LETTERS, k=2))


def _text(numbers: Iterable[int], letters: str) -> str:
    return "".join(f"{n:03d}{letters}" for n in numbers)


def make_data(lengths: Lengths, path: Path) -> None:
    """Write questions as JSON lines, the same at each call, and four that are none of them to held_out.jsonl."""
    rng = random.Random(0)
    drawn = dict.fromkeys((lengths.num_counted(rng), _letters(rng)) for _ in range(_NUM_QUESTIONS))
    rows = [
        json.dumps({"prompt": _text([n], letters), "answer": _text(reversed(range(n)), letters)}) + "\n"
        for n, letters in drawn
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(rows[4:]))
    path.with_name("held_out.jsonl").write_text("".join(rows[:4]))


def _demonstration(rng: random.Random) -> tuple[str, str]:
    """Return a prompt, and a response that may leave numbers out."""
    first, letters = rng.choice((UNEVEN, LONG_TAIL)).num_counted(rng), _letters(rng)
    numbers, n = [], first
    while n > 0:
        n = max(0, n - (rng.randint(2, 4) if rng.random() < _SKIP_RATE else 1))
        numbers.append(n)
    return _text([first], letters), _text(numbers, letters)


def make_start() -> None:
    """Train the starting policy, unless its folder exists; that takes some minutes of one core."""
    if (START / "config.json").exists():
        return
    import torch

    from quatro_ray.config import TinyModelConfig
    from quatro_ray.engines.tiny_model import make_model, save_pretrained
    from quatro_ray.engines.tiny_tokenizer import make_tokenizer

    tokenizer = make_tokenizer()
    config = TinyModelConfig(kind="tiny", num_layers=5, hidden_size=256, num_heads=4)
    model = make_model(config, tokenizer, seed=0)
    tokenizer.model_max_length = model.config.max_position_embeddings = 1_024
    optimizer = torch.optim.AdamW(model.parameters(), lr=_WARMUP_LEARNING_RATE, weight_decay=0.01)
    rng = random.Random(0)
    for step in range(1, _WARMUP_STEPS + 1):
        optimizer.param_groups[0]["lr"] = _WARMUP_LEARNING_RATE * min(1.0, step / 20, 2 * (1 - step / _WARMUP_STEPS))
        loss = _warmup_loss(model, tokenizer, rng)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0:
            print(f"starting policy, step {step} of {_WARMUP_STEPS}: loss {loss.item():.3f}", flush=True)
    save_pretrained(model, tokenizer, START)


def _warmup_loss(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> Tensor:
    """Return the loss on demonstrations of like length, padded."""
    import torch
    import torch.nn.functional as F

    drawn = sorted((_demonstration(rng) for _ in range(64)), key=lambda pair: len(pair[1]))
    first = rng.randrange(len(drawn))
    width = len(drawn[first][1]) + _PROMPT_TOKENS + 1
    rows = drawn[max(0, first + 1 - max(1, _WARMUP_TOKENS // width)) : first + 1]
    tokens = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full_like(tokens, -100)
    for i, (prompt, response) in enumerate(rows):
        ids = torch.tensor([*tokenizer.encode(prompt + response), tokenizer.eos_token_id])
        tokens[i, : len(ids)] = ids
        labels[i, _PROMPT_TOKENS : len(ids)] = ids[_PROMPT_TOKENS:]
    logits = model(tokens).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
