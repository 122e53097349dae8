"""The whole system against TRL's GRPOTrainer on two cores: `python -m benchmarks.against_trl`.

    pip install -e '.[trl]'
    python -m benchmarks.against_trl [--case CASE]… [--pairs 3]

Both train the model of benchmarks/counting.py (4.9 million weights, float32) on the same questions with 8 groups of 8
responses a step, and each has both cores. Lengths are uneven up to 256 tokens, or have a long tail up to 512; the runs
of the case "learning" are long enough to learn most of the task. Runs take turns; those that have ended are kept in
runs/against_trl and not made again.

A trained token is a response token that an optimiser step used. Tokens per second and per CPU-second are those after
the first steps, of all processes. Times count from the command; the first pair fills the caches. The mean reward of a
step is pass@1 on its questions: `pass_at_1_0.5_s` is the time until pass@1 on the questions of some steps in a row is
0.5. The last line is JSON; the exit status is 1 if a ratio of medians is below MINIMUM.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks.counting import FOLDER, LONG_TAIL, UNEVEN, Lengths, make_data, make_start
from benchmarks.process_tree import watch_lines

MINIMUM = 1.2
GROUPS, GROUP_SIZE, LEARNING_RATE = 8, 8, 2e-4
NUM_WARMUP_STEPS, LR_WARMUP_STEPS = 4, 3


@dataclass(frozen=True)
class Case:
    """Lengths and duration of runs.

    Attributes:
        lengths: distribution of the lengths of responses.
        num_steps: optimiser steps.
        targets: values of pass@1 whose time is measured.
        window: number of steps in a row whose questions pass@1 is a mean over.
        ratio: which ratio of medians must not be below MINIMUM.
    """

    lengths: Lengths
    num_steps: int
    targets: tuple[float, ...]
    window: int
    ratio: str


CASES = {
    "uneven to 256": Case(UNEVEN, 24, (0.5,), 5, "tokens_per_cpu_s"),
    "long tail to 512": Case(LONG_TAIL, 24, (0.5,), 5, "tokens_per_s"),
    "learning": Case(UNEVEN, 80, (0.5, 0.6, 0.7, 0.8), 10, "tokens_per_cpu_s"),
}
_DEADLINE_S = 1_800
_FOLDER = Path("runs/against_trl")


def ours(case: Case, data: Path, folder: Path) -> list[str]:
    """Return the command of a run of quatro_ray."""
    settings = {
        "run.dir": folder,
        "run.num_steps": case.num_steps,
        "data.train.counting.path": data,
        "data.eval.counting.path": data.with_name("held_out.jsonl"),
        "generator.max_response_tokens": case.lengths.longest,
        "generator.max_num_seqs": GROUPS * GROUP_SIZE,
        "replay.groups_per_step": GROUPS,
        "replay.group_size": GROUP_SIZE,
        "learner.learning_rate": LEARNING_RATE,
        "learner.num_warmup_steps": LR_WARMUP_STEPS,
    }
    command = [str(Path(sys.executable).with_name("quatro-ray")), "train", "benchmarks/counting.yaml"]
    return command + [f"{name}={value}" for name, value in settings.items()]


def trl(case: Case, data: Path, folder: Path) -> list[str]:
    """Return the command of a run of TRL: its defaults, without what slows it down on a CPU."""
    config: dict[str, Any] = {
        "max_steps": case.num_steps,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": LR_WARMUP_STEPS,
        "num_generations": GROUP_SIZE,
        "per_device_train_batch_size": GROUPS * GROUP_SIZE // 4,
        "gradient_accumulation_steps": 4,
        "max_completion_length": case.lengths.longest,
        "temperature": 1.0,
        "beta": 0.0,
        "adam_beta2": 0.95,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "dataloader_pin_memory": False,
    }
    return [sys.executable, "-m", "benchmarks.trl_trainer", str(data), str(folder), "--config", json.dumps(config)]


COMMANDS = {"quatro_ray": ours, "trl": trl}


def run(system: str, case: str, number: int) -> dict[str, float | None]:
    """Return the figures of one run, which is made if it is not kept."""
    folder = _FOLDER / f"{system}-{case.replace(' ', '_')}-{number}"
    kept = folder.with_suffix(".json")
    if not kept.exists():
        data = FOLDER / f"{case.replace(' ', '_')}.jsonl"
        make_data(CASES[case].lengths, data)
        metrics = folder / "metrics.jsonl"
        command = COMMANDS[system](CASES[case], data, folder)
        moments = watch_lines(
            command, metrics, folder.with_suffix(".log"), env={"OMP_NUM_THREADS": "2"}, deadline_s=_DEADLINE_S
        )
        steps = [json.loads(line) for line in metrics.read_text().splitlines()]
        kept.write_text(json.dumps({"moments": moments, "steps": [_short(step) for step in steps]}))
    return figures(CASES[case], json.loads(kept.read_text()))


def _short(step: dict[str, Any]) -> dict[str, float]:
    return {name: step[name] for name in ("tokens/trained", "reward/mean")}


def figures(case: Case, record: dict[str, Any]) -> dict[str, float | None]:
    """Return speeds after the first steps, and times from the command to the first step and to each target."""
    moments, steps = record["moments"], record["steps"]
    (begun, cpu_begun), (ended, cpu_ended) = moments[NUM_WARMUP_STEPS - 1], moments[-1]
    tokens = sum(step["tokens/trained"] for step in steps[NUM_WARMUP_STEPS:])
    rewards = [step["reward/mean"] for step in steps]
    means = {end: mean(rewards[end - case.window : end]) for end in range(case.window, len(steps) + 1)}
    reached = {target: [end for end in means if means[end] >= target] for target in case.targets}
    return {
        "tokens_per_s": tokens / (ended - begun),
        "tokens_per_cpu_s": tokens / (cpu_ended - cpu_begun),
        "tokens_per_step": tokens / (len(steps) - NUM_WARMUP_STEPS),
        "first_step_s": moments[0][0],
        **{f"pass_at_1_{t}_s": moments[ends[0] - 1][0] if ends else None for t, ends in reached.items()},
        "first_reward": means[case.window],
        "last_reward": means[len(steps)],
    }


def compare(case: str, pairs: int) -> dict[str, Any]:
    """Return medians of both systems, and their ratios: more than 1 is better for quatro_ray."""
    found: dict[str, list[dict[str, float | None]]] = {system: [] for system in COMMANDS}
    for number in range(pairs):
        for system in list(COMMANDS)[:: 1 if number % 2 else -1]:
            found[system].append(run(system, case, number))
            print(f"{case}, {system}: {found[system][-1]}", flush=True)
    medians = {
        system: {name: _median([run[name] for run in runs]) for name in runs[0]} for system, runs in found.items()
    }
    mine, other = medians["quatro_ray"], medians["trl"]
    ratios = {name: _ratio(mine[name], other[name]) for name in ("tokens_per_s", "tokens_per_cpu_s")}
    times = ["first_step_s", *(name for name in mine if name.startswith("pass_at_1_"))]
    ratios |= {name: _ratio(other[name], mine[name]) for name in times}
    return {**medians, "ratios": ratios, "pairs": pairs}


def _median(values: list[float | None]) -> float | None:
    """Return the median, or None if that is a target that was not reached."""
    found = median(math.inf if value is None else value for value in values)
    return round(found, 3) if math.isfinite(found) else None


def _ratio(above: float | None, below: float | None) -> float | None:
    return round(above / below, 3) if above is not None and below is not None else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=list(CASES), action="append", help="by default all")
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    if find_spec("trl") is None:
        sys.exit("the benchmark needs TRL: pip install -e '.[trl]'")
    _FOLDER.mkdir(parents=True, exist_ok=True)
    make_start()
    cases = {case: compare(case, options.pairs) for case in options.case or CASES}
    missed = [
        f"{case}: {CASES[case].ratio}"
        for case, found in cases.items()
        if (found["ratios"][CASES[case].ratio] or 0.0) < MINIMUM
    ]
    print(json.dumps({"cases": cases, "missed": missed, "cores": os.cpu_count()}))
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
