"""The starting policy: trained on partly wrong demonstrations until a share of its samples is correct."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.toy.model import ToyModel
from benchmarks.toy.tasks import Task, make_task

_TARGET = 0.25
_WRONG_ANSWER_SHARE = 0.3
_BATCH = 128
_LEARNING_RATE = 4e-3
_CHECK_EVERY = 25
_MAX_STEPS = 6000


def start_policy(task_name: str, seed: int, folder: Path) -> ToyModel:
    """Return the starting policy of a task and seed, which is cached in `folder`."""
    task = make_task(task_name)
    torch.manual_seed(seed)
    model = ToyModel(task.vocabulary, task.prompts.shape[1] + task.max_response_tokens)
    path = folder / f"{task_name}-{seed}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model
    _warm_up(model, task, seed)
    folder.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{seed}.part")
    torch.save(model.state_dict(), beside)
    beside.rename(path)
    return model


def _warm_up(model: ToyModel, task: Task, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=0.01)
    for step in range(1, _MAX_STEPS + 1):
        loss = _loss(model, task, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % _CHECK_EVERY == 0 and _pass_rate(model, task, generator) >= _TARGET:
            return


def _loss(model: ToyModel, task: Task, generator: torch.Generator) -> Tensor:
    rows = torch.randint(len(task.prompts), (_BATCH,), generator=generator)
    others = torch.randint(len(task.prompts), (_BATCH,), generator=generator)
    wrong = torch.rand(_BATCH, generator=generator) < _WRONG_ANSWER_SHARE
    answers = task.answers[torch.where(wrong, others, rows)]
    logprobs = model.score(task.prompts[rows], answers[:, None])[:, 0]
    # the first eos is part of the answer, later ones are padding
    counted = (answers == task.eos).cumsum(1) <= 1
    return F.nll_loss(logprobs[counted], answers[counted])


def _pass_rate(model: ToyModel, task: Task, generator: torch.Generator) -> float:
    responses, _, _ = model.sample(task.held_out_prompts, 4, task.max_response_tokens, task.eos, generator)
    return float(task.rewards(responses, task.held_out_answers).mean())
