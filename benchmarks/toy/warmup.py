"""The starting policy, trained on partly wrong demonstrations as its task says.

Its weights are files of this repository, because another processor rounds otherwise and trains another policy: from two
such starts all methods ended 0.03 apart in pass@1, more than methods differ from each other.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.toy.model import ToyModel
from benchmarks.toy.tasks import Task, make_task

_LEARNING_RATE = 4e-3
_CHECK_EVERY = 25


def start_policy(task_name: str, seed: int, folder: Path) -> ToyModel:
    """Return the starting policy of a task and seed; if `folder` has no file of it, it is trained and written there.

    Weights are rounded to float16.
    """
    task = make_task(task_name)
    torch.manual_seed(seed)
    model = ToyModel(task.vocabulary, task.prompts.shape[1] + task.max_response_tokens)
    path = folder / f"{task_name}-{seed}.safetensors"
    if not path.exists():
        _warm_up(model, task, seed)
        folder.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}.part")
        save_file({name: value.half() for name, value in model.state_dict().items()}, beside)
        beside.rename(path)
    model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return model


def _warm_up(model: ToyModel, task: Task, seed: int) -> None:
    recipe = task.warm_up
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, weight_decay=0.01)
    for step in range(1, recipe.num_steps + 1):
        if recipe.target is None:
            # constant in the first half, then linear to zero
            optimizer.param_groups[0]["lr"] = _LEARNING_RATE * min(1.0, 2 * (1 - step / recipe.num_steps))
        loss = _loss(model, task, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if recipe.target is None or step % _CHECK_EVERY:
            continue
        if _pass_rate(model, task, generator) >= recipe.target:
            return


def _loss(model: ToyModel, task: Task, generator: torch.Generator) -> Tensor:
    rows = torch.randint(len(task.prompts), (task.warm_up.num_demonstrations,), generator=generator)
    demonstrations = task.warm_up.demonstrate(task, rows, generator)
    logprobs = model.score(task.prompts[rows], demonstrations[:, None])[:, 0]
    # the first eos is part of the answer, later ones are padding
    counted = (demonstrations == task.eos).cumsum(1) <= 1
    return F.nll_loss(logprobs[counted], demonstrations[counted])


def _pass_rate(model: ToyModel, task: Task, generator: torch.Generator) -> float:
    responses, _, _ = model.sample(task.held_out_prompts, 4, task.max_response_tokens, task.eos, generator)
    return float(task.rewards(responses, task.held_out_answers).mean())
