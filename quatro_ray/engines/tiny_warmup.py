"""Supervised warm-up of a tiny model, which makes it a policy that RL can improve.

Shape letters: B demonstrations of a batch, T tokens of the longest.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Qwen2ForCausalLM, Qwen2Tokenizer

from quatro_ray.config import TinyModelConfig
from quatro_ray.engines.tiny_model import make_model, save_pretrained
from quatro_ray.engines.tiny_tokenizer import make_tokenizer
from quatro_ray.types import Query

_CHECK_EVERY = 50
_SAMPLES_PER_CHECK = 4
"""Samples per held-out question in each check."""
_IGNORE = -100


def warm_up(
    config: TinyModelConfig,
    train: Sequence[Query],
    held_out: Sequence[Query],
    seed: int,
    path: Path,
) -> Iterator[str]:
    """Make a model, train it on demonstrations until it answers held-out questions well enough, and save it.

    Training ends when the share of right samples reaches config.warmup.target_pass_rate, or after max_steps.

    Args:
        config: size of the model, and settings of the warm-up.
        train: questions whose answers are the demonstrations.
        held_out: questions for the pass rate.
        seed: seed of the initial weights and of the order of demonstrations.
        path: folder to save the model in.

    Yields:
        Lines of progress to show.
    """
    tokenizer = make_tokenizer()
    model = make_model(config, tokenizer, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.warmup.learning_rate, weight_decay=0.01)
    rng = random.Random(seed)
    yield f"warm-up: {sum(p.numel() for p in model.parameters()):,} weights, at most {config.warmup.max_steps} steps"
    for step in range(1, config.warmup.max_steps + 1):
        batch = [_demonstration(train, config.warmup.wrong_answer_share, rng) for _ in range(config.warmup.batch_size)]
        loss = _step(model, optimizer, _encode(tokenizer, batch))
        if step % _CHECK_EVERY == 0:
            rate = pass_rate(model, tokenizer, held_out)
            if step % (4 * _CHECK_EVERY) == 0 or rate >= config.warmup.target_pass_rate:
                yield f"warm-up step {step}: loss {loss:.3f}, {rate:.0%} of samples right"
            if rate >= config.warmup.target_pass_rate:
                break
    save_pretrained(model, tokenizer, path)


def _demonstration(train: Sequence[Query], wrong_answer_share: float, rng: random.Random) -> Query:
    query = rng.choice(train)
    return replace(query, answer=rng.choice(train).answer) if rng.random() < wrong_answer_share else query


def _step(model: Qwen2ForCausalLM, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> float:
    tokens, labels = batch
    loss = F.cross_entropy(model(tokens).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=_IGNORE)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def _encode(tokenizer: Qwen2Tokenizer, batch: Sequence[Query]) -> tuple[Tensor, Tensor]:
    """Return tokens, int64 [B, T], padded on the right, and labels, int64 [B, T], _IGNORE outside answers."""
    rows = [(tokenizer.encode(q.prompt), [*tokenizer.encode(q.answer), tokenizer.eos_token_id]) for q in batch]
    width = max(len(p) + len(a) for p, a in rows)
    tokens = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full_like(tokens, _IGNORE)
    for i, (prompt, answer) in enumerate(rows):
        tokens[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    return tokens, labels


@torch.no_grad()
def pass_rate(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, queries: Sequence[Query]) -> float:
    """Return the share of samples at temperature 1 that equal the demonstrated answer.

    Prompts of equal length are sampled together.
    """
    generator = torch.Generator().manual_seed(0)
    longest = max(len(tokenizer.encode(q.answer)) for q in queries) + 1
    by_length: dict[int, list[Query]] = {}
    for query in queries:
        by_length.setdefault(len(query.prompt), []).append(query)
    right = 0
    for same in by_length.values():
        same = same * _SAMPLES_PER_CHECK
        tokens = torch.tensor([tokenizer.encode(q.prompt) for q in same])
        start = tokens.shape[1]
        for _ in range(longest):
            probabilities = torch.softmax(model(tokens).logits[:, -1], dim=-1)
            tokens = torch.cat([tokens, torch.multinomial(probabilities, 1, generator=generator)], dim=1)
        for query, row in zip(same, tokens[:, start:].tolist(), strict=True):
            answer = row[: row.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in row else row
            right += tokenizer.decode(answer).strip() == query.answer
    return right / (len(queries) * _SAMPLES_PER_CHECK)
