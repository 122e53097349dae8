"""QUATRO against other methods on the whole system: responses of 60 tokens, staleness 8, 3 times the learning rate.

    python -m benchmarks.long_responses

The task is that of benchmarks/toy/chain.py with ten symbols, in letters: the prompt is two increments and a state, the
response adds the increments in turn, and the reward is 1 if the last state is right. The starting policy is a tiny
model that was trained on chains with random errors, so that it knows more than it shows; its weights are a file, as
those of the study are. Every method and seed is one run of `quatro-ray train` with benchmarks/long_responses.yaml. Runs
that have ended are kept in runs/long_responses and not made again. The last line is JSON; the exit status is 1 if the
mean of QUATRO's runs ends more than 0.02 below that of another method, or one of them ends below its start.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from safetensors.torch import load_model, save_model
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.toy.chain import all_prompts, chains, demonstrations
from quatro_ray.config import TinyModelConfig
from quatro_ray.engines.tiny_model import make_model, save_pretrained
from quatro_ray.engines.tiny_tokenizer import make_tokenizer
from quatro_ray.types import Query, Response

METHODS = ("quatro", "grpo", "dapo", "gspo")
SEEDS = (0, 1)
MARGIN = 0.02
NUM_STATES, NUM_SYMBOLS = 60, 10
_NUM_HELD_OUT = 96
_WARMUP_STEPS, _WARMUP_BATCH, _WARMUP_LEARNING_RATE = 8000, 64, 4e-3
_RUN_TIMEOUT_S = 3600
_CONFIG = Path("benchmarks/long_responses.yaml")
_FOLDER = Path("runs/long_responses")
_START = Path("benchmarks/figures/starts/long_responses.safetensors")
# GSPO's range as in the study; the paper's is for responses of thousands of tokens
_SETTINGS = {"gspo": {"clip_low": 0.1, "clip_high": 0.15}}


def ends_right(query: Query, response: Response) -> float:
    """Return 1 if the response has the right length and ends with the answer."""
    return float(len(response.text) == NUM_STATES and response.text[-1:] == query.answer)


def prompt_text(prompt: Tensor) -> str:
    """Return increments and state [3] as letters; the case tells them apart, because the model's attention has only
    relative positions."""
    a, b, state = prompt.tolist()
    return f"{_small(a)}{_capital(b)}{_capital(state)}="


def response_text(states: Tensor) -> str:
    """Return states [NUM_STATES] as letters: small where increment a was added, capital where b was."""
    return "".join((_capital if i % 2 else _small)(state) for i, state in enumerate(states.tolist()))


def _small(symbol: int) -> str:
    return chr(ord("a") + symbol)


def _capital(symbol: int) -> str:
    return chr(ord("A") + symbol)


def make_data() -> Tensor:
    """Write training and held-out questions, whose answer is the last state; return the training prompts [n, 3]."""
    prompts = all_prompts(NUM_SYMBOLS)
    prompts = prompts[torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0))]
    states = chains(prompts, NUM_STATES, num_symbols=NUM_SYMBOLS)[:, :-1]
    rows = [
        json.dumps({"prompt": prompt_text(p), "answer": response_text(s)[-1]})
        for p, s in zip(prompts, states, strict=True)
    ]
    _FOLDER.mkdir(parents=True, exist_ok=True)
    (_FOLDER / "eval.jsonl").write_text("\n".join(rows[:_NUM_HELD_OUT]) + "\n")
    (_FOLDER / "train.jsonl").write_text("\n".join(rows[_NUM_HELD_OUT:]) + "\n")
    return prompts[_NUM_HELD_OUT:]


def make_start(prompts: Tensor) -> None:
    """Write the starting policy as a model folder. If its file is missing, it is trained, for 20 minutes of a core."""
    tokenizer = make_tokenizer()
    model = make_model(TinyModelConfig(kind="tiny"), tokenizer, seed=0)
    if not _START.exists():
        _warm_up(model, tokenizer, prompts)
        save_model(copy.deepcopy(model).half(), str(_START))
    load_model(model, _START)
    save_pretrained(model, tokenizer, _FOLDER / "start")


def _warm_up(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Tensor) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=_WARMUP_LEARNING_RATE, weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    for step in range(_WARMUP_STEPS):
        drawn = prompts[torch.randint(len(prompts), (_WARMUP_BATCH,), generator=generator)]
        states = demonstrations(drawn, NUM_STATES, generator, num_symbols=NUM_SYMBOLS)[:, :-1]
        texts = [prompt_text(p) + response_text(s) for p, s in zip(drawn, states, strict=True)]
        tokens = torch.tensor([[*tokenizer.encode(text), tokenizer.eos_token_id] for text in texts])
        labels = tokens[:, -NUM_STATES - 1 :]
        logits = model(tokens).logits[:, -NUM_STATES - 2 : -1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        # constant in the first half, then linear to zero
        optimizer.param_groups[0]["lr"] = _WARMUP_LEARNING_RATE * min(1.0, 2 * (1 - step / _WARMUP_STEPS))
        optimizer.step()
        if step % 500 == 0:
            print(f"starting policy, step {step} of {_WARMUP_STEPS}: loss {loss.item():.3f}", flush=True)


def run_dir(method: str, seed: int) -> Path:
    return _FOLDER / f"{method}-{seed}"


def run_one(method: str, seed: int) -> None:
    """Train one method from the starting policy, unless that run has ended; its output is in the run's folder."""
    folder = run_dir(method, seed)
    if (folder / "summary.json").exists():
        return
    objective = json.dumps({"kind": method} | _SETTINGS.get(method, {}))
    command = [str(Path(sys.executable).with_name("quatro-ray")), "train", str(_CONFIG)]
    overrides = [f"run.dir={folder}", f"run.seed={seed}", f"objective={objective}"]
    log = folder.with_suffix(".log")
    with log.open("w") as file:
        done = subprocess.run(
            [*command, *overrides], stdout=file, stderr=subprocess.STDOUT, check=False, timeout=_RUN_TIMEOUT_S
        )
    if done.returncode:
        sys.exit(f"{method}, seed {seed}: quatro-ray train ended with status {done.returncode}; see {log}")


def figures(method: str, seed: int) -> dict[str, float]:
    """Return pass@1 at the start and the mean of the last two evaluations, and means of the last ten steps."""
    folder = run_dir(method, seed)
    evaluations = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rates = [evaluation["pass_at_1"] for evaluation in evaluations]
    last = metrics[-10:]
    return {
        "start": rates[0],
        "final": mean(rates[-2:]),
        "entropy": mean(m["policy/entropy"] for m in last),
        "staleness": mean(m["off_policy/staleness_mean"] for m in last),
    }


def main(seeds: Annotated[int, typer.Option(min=1, max=len(SEEDS))] = len(SEEDS)) -> None:
    torch.set_num_threads(1)
    make_start(make_data())
    found: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
    for seed in SEEDS[:seeds]:
        for method in METHODS:
            run_one(method, seed)
            found[method].append(figures(method, seed))
            print(f"{method}, seed {seed}: {found[method][-1]}", flush=True)
    finals = {method: mean(run["final"] for run in runs) for method, runs in found.items()}
    missed = finals["quatro"] < max(finals.values()) - MARGIN or any(r["final"] < r["start"] for r in found["quatro"])
    result: dict[str, Any] = {"final_pass_at_1": finals, "runs": found, "missed": missed}
    print(json.dumps(result))
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    typer.run(main)
