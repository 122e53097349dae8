"""How much of the slower side's speed the whole system reaches: `python -m benchmarks.pipeline`.

The model and the long-tailed lengths of benchmarks/counting.py, engine and learner pinned to one core each:

- G: tokens a second of the engine by itself, under the load that it has in the system;
- L: trained tokens a second of the learner by itself, on groups that the engine made before;
- P: trained tokens a second of the whole system with `max_staleness: 6`, after its first steps; with 2 the engine may
  not begin enough groups to be full while it waits for the longest responses, and P is bound by that;
- S: the same with `max_staleness: 0`, where engine and learner wait for each other.

P is at most min(G, L), and P/S at most (1/G + 1/L)·min(G, L). In the first case both sides are about as fast, in the
second the engine is half as fast, because it decodes fewer responses at a time. G and L are measured at the same time,
because two cores share caches and memory; neither side waits for the other. In P and S the other processes of the
system share both cores, so each side gets less than a core: `cores` says how much, and `P of the cores' shares` is P
relative to min(G, L) of as much CPU time. G, L and P are medians of rounds; S is of one run. The last line is JSON; the
exit status is 1 if a case misses a target.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import count, cycle
from pathlib import Path
from statistics import median
from typing import Any

from psutil import NoSuchProcess

from benchmarks.counting import FOLDER, LONG_TAIL, START, counts_right, make_data, make_start
from benchmarks.process_tree import ProcessTree, watch_lines
from quatro_ray.config import Config, dump_config, load_config

ENGINE_CORE, LEARNER_CORE = 0, 1
_CORES = {"GeneratorActor": ENGINE_CORE, "EngineCore": ENGINE_CORE, "LearnerActor": LEARNER_CORE}
_MAX_STALENESS = 6
_ROUNDS = 3
_NUM_STEPS, _NUM_WARMUP_STEPS, _NUM_LAST_STEPS = 26, 6, 6
_RECORDED_GROUPS, _WARMUP_BATCHES = 96, 2
_MEASURED_S = 40.0
_DEADLINE_S = 1_200
_LOOK_S = 2.0  # a look at all processes takes 7 ms
_ENV = {"OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@dataclass(frozen=True)
class Case:
    """What differs from benchmarks/counting.yaml, and the share of min(G, L) that P is to reach."""

    settings: dict[str, str | int]
    target: float


CASES = {
    "balanced": Case({"generator.max_num_seqs": 36}, 0.93),
    "slow engine": Case({"generator.max_num_seqs": 12}, 0.96),
}
_TARGET_OF_OVERLAP = 0.93
_TARGET_LOST_TO_UPDATES = 0.02


def config(case: Case, **settings: Any) -> Config:
    data = FOLDER / "pipeline.jsonl"
    common = {
        "run.num_steps": _NUM_STEPS,
        "generator.max_response_tokens": LONG_TAIL.longest,
        "data.train.counting.path": data,
        "data.eval.counting.path": data.with_name("held_out.jsonl"),
    }
    return load_config(
        Path("benchmarks/counting.yaml"), [f"{k}={v}" for k, v in (common | case.settings | settings).items()]
    )


# Each side by itself


class Barrier:
    """Lets two processes begin to measure at the same moment: each makes a file and waits for that of the other."""

    def __init__(self, folder: Path, part: str) -> None:
        self._mine = folder / f"{part}.ready"
        self._other = folder / f"{'train' if part == 'generate' else 'generate'}.ready"
        self._deadline = time.monotonic() + _DEADLINE_S

    def is_ready(self) -> bool:
        """Say that this process is ready, and return whether the other one is, too."""
        if time.monotonic() > self._deadline:
            raise TimeoutError(f"the other side was not ready within {_DEADLINE_S} s")
        self._mine.touch()
        return self._other.exists()


async def generate(case: Case, groups_file: Path, barrier: Barrier | None) -> float:
    """Keep an engine as busy as the system does, and return tokens a second.

    Args:
        groups_file: receives the groups.
        barrier: when to begin to measure; None to make some groups only.
    """
    from quatro_ray.engines.generation import GenerationEngine
    from quatro_ray.replay.serialization import to_bytes
    from quatro_ray.types import Query, Response, RolloutGroup, SamplingParams, Score

    settings = config(case)
    rows = [json.loads(line) for line in (FOLDER / "pipeline.jsonl").read_text().splitlines()]
    engine = GenerationEngine(str(START), settings.generator, device="cpu", sync_backend="gloo", seed=0)
    await engine.start()
    groups: list[RolloutGroup] = []
    numbers = count()

    async def one(number: int) -> RolloutGroup:
        row = rows[number % len(rows)]
        query = Query(str(number), row["prompt"], row["answer"])
        params = SamplingParams(1.0, 1.0, settings.generator.max_response_tokens, number)
        group = await engine.generate(number, query, params, settings.replay.group_size)
        scores = [Score(counts_right(query, Response(r.text, r.num_tokens, False))) for r in group.rollouts]
        return replace(group, rollouts=tuple(replace(r, score=s) for r, s in zip(group.rollouts, scores, strict=True)))

    async def keep_busy() -> None:
        while True:
            groups.append(await one(next(numbers)))

    workers = [asyncio.create_task(keep_busy()) for _ in range(settings.generator.max_groups_in_flight)]
    speed = 0.0
    if barrier is None:
        while len(groups) < _RECORDED_GROUPS:
            await asyncio.sleep(0.1)
    else:
        while len(groups) < _RECORDED_GROUPS // 3 or not barrier.is_ready():
            await asyncio.sleep(0.1)
        begun, first = time.perf_counter(), engine.load().num_sampled_tokens
        await asyncio.sleep(_MEASURED_S)
        speed = (engine.load().num_sampled_tokens - first) / (time.perf_counter() - begun)
    for worker in workers:
        worker.cancel()
    await asyncio.gather(*workers, return_exceptions=True)
    await engine.shutdown()
    with groups_file.open("w") as file:
        file.writelines(to_bytes(group).hex() + "\n" for group in groups)
    return speed


def train(case: Case, groups_file: Path, barrier: Barrier) -> float:
    """Train on recorded groups, and return response tokens a second."""
    import torch

    from benchmarks.model_engines import free_port
    from quatro_ray.engines.learner_spec import LearnerSpec
    from quatro_ray.engines.learning import LearningEngine
    from quatro_ray.replay.packing import pack
    from quatro_ray.replay.serialization import from_bytes
    from quatro_ray.replay.staleness import Lineage

    torch.set_num_threads(1)
    settings = config(case)
    learner = settings.learner
    spec = LearnerSpec(
        model_path=str(START), config=learner, objective=settings.objective, device="cpu", temperature=1.0,
        max_response_tokens=settings.generator.max_response_tokens, seed=0, num_steps=_NUM_STEPS,
    )  # fmt: skip
    engine = LearningEngine(spec, rank=0)
    engine.start("127.0.0.1", free_port())
    groups = cycle([from_bytes(bytes.fromhex(line)) for line in groups_file.read_text().splitlines()])

    def step() -> int:
        chosen = [next(groups) for _ in range(settings.replay.groups_per_step)]
        tokens = learner.tokens_per_micro_batch
        lineage = Lineage.unbroken(engine.version)
        batch = pack(chosen, lineage, num_ranks=1, rank=0, tokens_per_micro_batch=tokens)
        engine.train_step(batch, engine.version)
        return len(batch.rollout_index)

    for _ in range(_WARMUP_BATCHES):
        step()
    while not barrier.is_ready():
        step()  # the other side is to find this core busy
    num_tokens, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < _MEASURED_S:
        num_tokens += step()
    speed = num_tokens / (time.perf_counter() - begun)
    engine.shutdown()
    return speed


def run_part(part: str, name: str, groups_file: Path) -> float:
    """Measure one side in this process, on its core."""
    case, barrier = CASES[name], Barrier(groups_file.parent, part)
    if part == "train":
        os.sched_setaffinity(0, {LEARNER_CORE})
        return train(case, groups_file, barrier)
    os.sched_setaffinity(0, {ENGINE_CORE})
    if part == "record":
        return asyncio.run(generate(case, groups_file, None))
    return asyncio.run(generate(case, groups_file.with_suffix(".again"), barrier))


def begin_part(part: str, name: str, groups_file: Path) -> subprocess.Popen[str]:
    """Start a part in a process of its own, whose messages go to a file beside the groups."""
    command = [sys.executable, "-m", "benchmarks.pipeline", "--part", part, "--case", name]
    command += ["--groups", str(groups_file)]
    with groups_file.with_name(f"{part}.log").open("w") as log:
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ | _ENV, start_new_session=True
        )


def result_of(process: subprocess.Popen[str], log: Path) -> float:
    """Return what a part has measured."""
    output, _ = process.communicate(timeout=_DEADLINE_S)
    if process.returncode:
        sys.exit(f"{log.stem}: {log.read_text()[-2000:]}")
    return float(output.splitlines()[-1])


def run_parts(parts: Sequence[str], name: str, groups_file: Path) -> list[float]:
    """Run parts at the same time, and return what they have measured."""
    for left in groups_file.parent.glob("*.ready"):
        left.unlink()
    processes = [begin_part(part, name, groups_file) for part in parts]
    try:
        return [result_of(p, groups_file.with_name(f"{part}.log")) for p, part in zip(processes, parts, strict=True)]
    finally:
        for process in processes:
            if process.poll() is None:  # the other one has failed
                os.killpg(process.pid, signal.SIGKILL)


# The whole system


class Cores:
    """Puts engine and learner on their cores, and keeps how much CPU time each has used at what time.

    Attributes:
        seconds: by core, pairs of the time and the CPU time so far.
    """

    def __init__(self) -> None:
        self.seconds: dict[int, list[tuple[float, float]]] = {ENGINE_CORE: [], LEARNER_CORE: []}

    def look(self, tree: ProcessTree) -> None:
        """Pin all threads that there are by now."""
        used = dict.fromkeys(self.seconds, 0.0)
        for process in tree.processes():
            with suppress(NoSuchProcess, ProcessLookupError):
                title = " ".join(process.cmdline())
                for core in {core for name, core in _CORES.items() if name in title}:
                    used[core] += sum(process.cpu_times()[:2])
                    for thread in process.threads():
                        os.sched_setaffinity(thread.id, {core})
        for core, seconds in used.items():
            self.seconds[core].append((time.monotonic(), seconds))

    def share(self, core: int, begin: float, end: float) -> float:
        """Return the share of a core that its side had between two times."""
        times = [(at, used) for at, used in self.seconds[core] if begin <= at <= end]
        return (times[-1][1] - times[0][1]) / (times[-1][0] - times[0][0])


def together(case: Case, max_staleness: int, folder: Path, number: int = 0) -> dict[str, Any]:
    """Return tokens a second of the whole system after its first steps, and where the time went."""
    run = folder / f"staleness-{max_staleness}-{number}"
    file = run.with_suffix(".yaml")
    file.write_text(dump_config(config(case, **{"run.dir": run, "replay.max_staleness": max_staleness})))
    command = [str(Path(sys.executable).with_name("quatro-ray")), "train", str(file)]
    metrics = run / "metrics.jsonl"
    cores, log, begun = Cores(), run.with_suffix(".log"), time.monotonic()
    moments = watch_lines(
        command, metrics, log, env={}, deadline_s=_DEADLINE_S, at_each_look=cores.look, look_every_s=_LOOK_S
    )
    steps = [json.loads(line) for line in metrics.read_text().splitlines()]
    measured = steps[_NUM_WARMUP_STEPS:-_NUM_LAST_STEPS]  # at the end there is nothing left to generate
    tokens = sum(step["tokens/trained"] for step in measured)
    begin, end = moments[_NUM_WARMUP_STEPS - 1].time, moments[-_NUM_LAST_STEPS - 1].time
    shares = {core: round(cores.share(core, begun + begin, begun + end), 3) for core in cores.seconds}
    return {"tokens_per_s": tokens / (end - begin), "cores": shares, "time_share": dict(_shares(measured))}


def _shares(steps: list[dict[str, Any]]) -> Iterator[tuple[str, float]]:
    seconds = sum(step["time/step_s"] for step in steps)
    for name in sorted({key for step in steps for key in step if key.startswith("time_share/")}):
        share = sum(step.get(name, 0.0) * step["time/step_s"] for step in steps) / seconds
        if share >= 0.001:
            yield name.removeprefix("time_share/"), round(share, 3)


# Comparison


def compare(name: str, num_rounds: int) -> dict[str, Any]:
    """Return the speeds of a case, and which targets it misses."""
    case = CASES[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        groups_file = folder / "groups"
        engines, learners, wholes = [], [], []
        run_parts(["record"], name, groups_file)
        for number in range(num_rounds):
            engine, learner = run_parts(["generate", "train"], name, groups_file)
            engines.append(engine)
            learners.append(learner)
            wholes.append(together(case, _MAX_STALENESS, folder, number))
            print(f"{name}: G {engine:.0f}, L {learner:.0f}, P {wholes[-1]}", flush=True)
        synchronous = together(case, 0, folder)
    return figures(case, engines, learners, wholes, synchronous)


def figures(
    case: Case,
    engines: list[float],
    learners: list[float],
    wholes: list[dict[str, Any]],
    synchronous: dict[str, Any],
) -> dict[str, Any]:
    """Return medians over the rounds, their ratios, and the targets that are missed."""
    engine, learner = median(engines), median(learners)
    slower = min(engine, learner)
    whole = median(each["tokens_per_s"] for each in wholes)
    perfect = (1 / engine + 1 / learner) * slower
    speed_up = whole / synchronous["tokens_per_s"]
    paused = median(each["time_share"].get("generators/paused", 0.0) for each in wholes)
    of_shares = [
        each["tokens_per_s"] / min(engine * each["cores"][ENGINE_CORE], learner * each["cores"][LEARNER_CORE])
        for each in wholes
    ]
    targets = {
        f"P/min(G, L) >= {case.target}": whole / slower >= case.target,
        f"P/S >= {_TARGET_OF_OVERLAP} of perfect overlap": speed_up >= _TARGET_OF_OVERLAP * perfect,
        f"engine paused <= {_TARGET_LOST_TO_UPDATES}": paused <= _TARGET_LOST_TO_UPDATES,
    }
    return {
        "G": round(engine),
        "L": round(learner),
        "P": round(whole),
        "S": round(synchronous["tokens_per_s"]),
        "P/min(G,L)": round(whole / slower, 3),
        "P of the cores' shares": round(median(of_shares), 3),
        "cores": [each["cores"] for each in wholes],
        "P/S": round(speed_up, 3),
        "perfect P/S": round(perfect, 3),
        "paused": round(paused, 4),
        "time_share": [each["time_share"] for each in wholes],
        "missed": [target for target, is_met in targets.items() if not is_met],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=list(CASES), action="append", help="by default all")
    parser.add_argument("--rounds", type=int, default=_ROUNDS)
    parser.add_argument("--part", choices=["record", "generate", "train"], help=argparse.SUPPRESS)
    parser.add_argument("--groups", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    names = arguments.case or list(CASES)
    if arguments.part:
        print(run_part(arguments.part, names[0], arguments.groups))
        return 0
    if (os.cpu_count() or 1) < 2:
        sys.exit("the benchmark pins engine and learner to a core each, and this machine has one")
    make_start()
    make_data(LONG_TAIL, FOLDER / "pipeline.jsonl")
    found = {}
    for name in names:
        found[name] = compare(name, arguments.rounds)
        print(f"{name}: {found[name]}", flush=True)
    print(json.dumps(found))
    return int(any(of_case["missed"] for of_case in found.values()))


if __name__ == "__main__":
    sys.exit(main())
