"""QUATRO against other methods over staleness and learning rate: small runs in one process on the product's code.

    python -m benchmarks.study run      # resumes where it stopped; each run is one line of the file of figures
    python -m benchmarks.study report   # tables and plots from the figures; exits with 1 if a claim does not hold

One seed comes first. A run takes 15 s of one core at 6 tokens, about one minute at 60, and five at 250.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.toy.grid import NUM_STEPS, Spec, all_specs

FIGURES = Path(__file__).parent / "figures" / "study.jsonl"
START_POLICIES = Path(__file__).parent / "figures" / "starts"
app = typer.Typer(add_completion=False, help=__doc__)


def run_one(spec: Spec, commit: str) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    from benchmarks.toy.tasks import make_task
    from benchmarks.toy.trainer import ToyTrainer, run
    from benchmarks.toy.warmup import start_policy

    model = start_policy(spec.task, spec.seed, START_POLICIES)
    trainer = ToyTrainer(model, make_task(spec.task), spec.objective(), spec.learner(), spec.staleness, spec.seed)
    return asdict(spec) | {"commit": commit} | run(trainer, NUM_STEPS[spec.task], spec.seed)


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def finished(path: Path) -> dict[str, dict[str, Any]]:
    """Return the runs by key. A last line that an interruption cut off is removed from the file."""
    if not path.exists():
        return {}
    lines = path.read_text().splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        path.write_text("".join(lines[:-1]))
        lines.pop()
    records = [json.loads(line) for line in lines]
    return {Spec(**{name: r[name] for name in Spec.__annotations__}).key: r for r in records}


@app.command("run")
def run_all(
    workers: Annotated[int, typer.Option(min=1)] = 2,
    minutes: Annotated[float, typer.Option(min=0, help="start no run after this time")] = float("inf"),
    out: Path = FIGURES,
) -> None:
    """Make the runs that are missing."""
    os.environ["OMP_NUM_THREADS"] = "1"
    deadline = time.monotonic() + 60 * minutes
    out.parent.mkdir(parents=True, exist_ok=True)
    done = finished(out)
    missing = iter([spec for spec in all_specs() if spec.key not in done])
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool, out.open("a") as file:
        count = len(done)
        for record in _in_turn(pool, missing, workers, deadline):
            file.write(json.dumps(record) + "\n")
            file.flush()
            count += 1
            print(f"{count}/{len(all_specs())} {_line(record)}", flush=True)


def _in_turn(
    pool: ProcessPoolExecutor, specs: Iterator[Spec], workers: int, deadline: float
) -> Iterator[dict[str, Any]]:
    """Keep one run for each worker in progress, and yield results as they arrive."""
    commit = _commit()
    waiting = {pool.submit(run_one, spec, commit) for spec in islice(specs, workers)}
    while waiting:
        future = next(as_completed(waiting))
        waiting.remove(future)
        if time.monotonic() < deadline and (spec := next(specs, None)) is not None:
            waiting.add(pool.submit(run_one, spec, commit))
        yield future.result()


def _line(record: dict[str, Any]) -> str:
    last = record["evaluations"][-1]
    name = Spec(**{n: record[n] for n in Spec.__annotations__}).key
    return f"{name}: pass@1 {last['pass_at_1']:.3f} pass@16 {last['pass_at_16']:.3f} entropy {last['entropy']:.2f}"


@app.command()
def report(figures: Path = FIGURES) -> None:
    """Write the study's section of docs/results.md and its plots; the last line printed is JSON."""
    from benchmarks.toy.report import write_report

    try:
        claims = write_report(list(finished(figures).values()), Path("docs"))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    print(json.dumps(claims))
    raise typer.Exit(0 if all(claims["holds"].values()) else 1)


if __name__ == "__main__":
    app()
