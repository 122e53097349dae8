"""The price of durability: the time of the ledger's writes and the checkpoints, relative to a training step.

    python -m benchmarks.durability [section.field=value …]

Trains the demo for some steps with its checkpoints, and reads from the run's timeline how long they blocked the
learner. The ledger is timed separately on groups of the same shape: the whole life cycle of B groups, alternately in a
file, as in a run, and in memory. The difference is charged to the step as if the learner waited for all of it. The last
line is JSON; the exit status is 1 if the price exceeds TARGET.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from quatro_ray.config import Config, load_config
from quatro_ray.jobs.train import train
from quatro_ray.replay.buffer import ReplayBuffer
from quatro_ray.types import Query
from tests.make import group, rollout

TARGET = 0.03
_CONFIG = Path("configs/demo.yaml")
_NUM_STEPS, _CHECKPOINT_EVERY = 100, 50
_ROUNDS = 30


def one_step_s(buffer: ReplayBuffer, config: Config, step: int) -> float:
    """Return the seconds that the ledger spends on B groups from admission to commit."""
    size, length = config.replay.group_size, config.generator.max_response_tokens
    queries = [Query(f"{step}/{i}", "1+2+3=", "6", source="sums") for i in range(config.replay.groups_per_step)]
    made = [group(0, *(rollout(length, version=step) for _ in range(size)), prompt_tokens=8) for _ in queries]
    begun = time.perf_counter()
    group_ids = buffer.admit(buffer.ledger.next_id(), queries, step)
    for group_id, whole in zip(group_ids, made, strict=True):
        buffer.ready(type(whole)(group_id, whole.query, whole.prompt_token_ids, whole.rollouts))
    assert None not in buffer.lease(step)
    buffer.commit(step)
    if step % _CHECKPOINT_EVERY == 0:
        buffer.absorbed(step)
    return time.perf_counter() - begun


def ledger_s(config: Config, folder: Path) -> tuple[float, float]:
    """Return the median seconds a step, with the ledger in a file and in memory."""
    durable, fleeting = (
        ReplayBuffer(config.replay, path, num_steps=10 * _ROUNDS) for path in (folder / "ledger.sqlite", ":memory:")
    )
    times = [(one_step_s(durable, config, i), one_step_s(fleeting, config, i)) for i in range(_ROUNDS)]
    return statistics.median(t for t, _ in times), statistics.median(t for _, t in times)


def phases(run_dir: Path) -> dict[str, list[float]]:
    """Return the durations in seconds of the learner's phases by name."""
    found: dict[str, list[float]] = {}
    for line in (run_dir / "timeline.jsonl").read_text().splitlines():
        record: dict[str, Any] = json.loads(line)
        if record.get("role") == "learner":
            found.setdefault(record["phase"], []).append(record["end"] - record["start"])
    return found


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            f"run.dir={folder}/run",
            f"run.num_steps={_NUM_STEPS}",
            f"checkpoint.every_steps={_CHECKPOINT_EVERY}",
        ]
        config = load_config(_CONFIG, [*overrides, *sys.argv[1:]])
        train(config)
        spent = phases(config.run.dir)
        in_file, in_memory = ledger_s(config, Path(folder))
    step_s = sum(sum(spent[name]) for name in ("wait", "train", "sync")) / _NUM_STEPS
    checkpoint_s = statistics.median(spent["checkpoint"])
    price = (in_file - in_memory + checkpoint_s / _CHECKPOINT_EVERY) / step_s
    figures = {
        "step_s": step_s,
        "ledger_file_s": in_file,
        "ledger_memory_s": in_memory,
        "checkpoint_blocking_s": checkpoint_s,
        "checkpoint_every_steps": _CHECKPOINT_EVERY,
        "price": price,
        "target": TARGET,
    }
    print(json.dumps(figures))
    return int(price > TARGET)


if __name__ == "__main__":
    sys.exit(main())
