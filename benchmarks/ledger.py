"""The cost of a group in the replay buffer, over the size of the run and of the group: `python -m benchmarks.ledger`.

One process, without Ray. CPU seconds, because other work on the machine does not change them. The last line is JSON;
the exit status is 1 if a target is missed.

- Each call of the controller on a ledger of 10 thousand to a million trained groups, and the growth between the ends.
- The copy of the database that each checkpoint gets, and the check of a ledger when a run is resumed; both read all of
  it, so they have no target.
- Groups a CPU-second through admission, generation, lease and commit, and the bytes written for each byte of rollouts.
- The tries to lease while the groups of a step arrive one by one, and the memory of the process with many ready groups.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from quatro_ray.actors.memory import collect_rarely
from quatro_ray.config import ReplayConfig
from quatro_ray.replay import serialization
from quatro_ray.replay.buffer import ReplayBuffer
from quatro_ray.replay.schema import damage_of
from quatro_ray.types import Query
from tests.make import group, rollout

RUNS = (10_000, 100_000, 1_000_000)
FLAT = 1.2
"""Largest ratio of a call's cost after a million groups to that after ten thousand; of calls above NOTICEABLE_S."""
NOTICEABLE_S = 1e-3
THROUGHPUT = {64: 2_000.0, 1_024: 200.0}
"""Groups of 16 rollouts a CPU-second, by the length of a rollout."""
WRITTEN = 1.3
"""Bytes written for each byte of rollouts."""
_STEP, _GROUP = 64, 16
_ROUNDS = 5
_READY = 100_000


def make_buffer(path: Path, *, groups_per_step: int = _STEP, num_steps: int = 10**9) -> ReplayBuffer:
    config = ReplayConfig(groups_per_step=groups_per_step, group_size=_GROUP, max_staleness=10**6)
    return ReplayBuffer(config, path, num_steps=num_steps)


def queries(count: int) -> list[Query]:
    return [Query(str(i), "1+2+3=", "6", source="sums") for i in range(count)]


def age(buffer: ReplayBuffer, num_groups: int) -> None:
    """Let the ledger have trained so many groups, written directly and without rollouts."""
    db, versions = buffer.ledger._db, buffer.ledger.versions
    before = buffer.ledger.next_id() - 1
    with buffer.ledger.transaction():
        buffer.ledger.admit(before + 1, queries(num_groups - before), 0)
        db.execute(
            "UPDATE groups SET state = 'trained', learner_version = (group_id - 1) / ?, oldest_version = "
            "(group_id - 1) / ?, newest_version = (group_id - 1) / ?, num_tokens = 1024 WHERE state = 'pending'",
            (_STEP, _STEP, _STEP),
        )
        for version in range(versions.newest(), num_groups // _STEP):
            versions.add_step(version)


def cpu_s(call: Callable[[], object]) -> float:
    begun = time.process_time()
    call()
    return time.process_time() - begun


def calls(buffer: ReplayBuffer) -> dict[str, float]:
    """Return the CPU seconds of the controller's calls, medians."""
    one_step(buffer, buffer.ledger.versions.newest(), 4)  # so that as many rollouts are stored in every run
    version = buffer.ledger.versions.newest()
    found = {
        "capacity": median(cpu_s(lambda: buffer.capacity(version)) for _ in range(_ROUNDS)),
        "recover": median(cpu_s(buffer.recover) for _ in range(_ROUNDS)),
        "lease, none ready": median(cpu_s(lambda: buffer.lease(version)) for _ in range(_ROUNDS)),
        "absorbed": median(cpu_s(lambda: buffer.absorbed(version)) for _ in range(_ROUNDS)),
    }
    step: list[float] = []
    for _ in range(_ROUNDS):
        number = buffer.ledger.versions.newest()
        step.append(cpu_s(lambda number=number: one_step(buffer, number, 4)))  # type: ignore[misc]
    found["a step of 64 small groups"] = median(step)
    found["fall back one step"] = median(_fall_back_s(buffer) for _ in range(_ROUNDS))
    buffer.end_run()
    return found


def whole(buffer: ReplayBuffer, path: Path) -> dict[str, float]:
    """Return the CPU seconds of a copy and of a check of the whole database, and its size."""
    copy = path.with_name("copy.sqlite")
    found = {
        "copy_s": round(cpu_s(lambda: buffer.ledger.snapshot(copy)), 3),
        "check_s": round(cpu_s(lambda: damage_of(copy)), 3),
        "mib": round(copy.stat().st_size / 2**20, 1),
    }
    copy.unlink()
    return found


def _fall_back_s(buffer: ReplayBuffer) -> float:
    """Train one more step and fall back by it."""
    before = buffer.ledger.versions.newest()
    one_step(buffer, before, 4)
    return cpu_s(lambda: buffer.fall_back(before, before + 1))


def one_step(buffer: ReplayBuffer, version: int, length: int) -> int:
    """Take one step's groups from admission to commit; return the bytes of their rollouts."""
    ids = buffer.admit(buffer.ledger.next_id(), queries(_STEP), version)
    payload = 0
    for group_id in ids:
        made = group(group_id, *(rollout(length, version=version) for _ in range(_GROUP)), prompt_tokens=32)
        payload += len(serialization.to_bytes(made)) if group_id == ids[0] else 0
        buffer.ready(made)
    buffer.lease(version)
    buffer.commit(version)
    buffer.absorbed(version)
    return payload * len(ids)


def making_s(length: int) -> float:
    """Return the CPU seconds of making the groups of a step and measuring the first, which are not the buffer's."""

    def make() -> None:
        for i in range(_STEP):
            made = group(i, *(rollout(length) for _ in range(_GROUP)), prompt_tokens=32)
            if i == 0:
                serialization.to_bytes(made)

    return median(cpu_s(make) for _ in range(_ROUNDS))


def throughput(folder: Path, length: int) -> dict[str, float]:
    """Return groups a CPU-second, and bytes written for each byte of rollouts."""
    buffer = make_buffer(folder / f"{length}.sqlite")
    one_step(buffer, 0, length)
    written, begun = _written_bytes(), time.process_time()
    payload = sum(one_step(buffer, step, length) for step in range(1, _ROUNDS + 1))
    seconds = time.process_time() - begun - _ROUNDS * making_s(length)
    buffer.ledger.flush()
    ratio = (_written_bytes() - written) / payload
    buffer.ledger.close()
    return {"groups_per_cpu_s": round(_ROUNDS * _STEP / seconds), "written_per_byte": round(ratio, 2)}


def _written_bytes() -> int:
    """Return the bytes that this process has passed to write calls."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["wchar"])


def lease_tries_s(folder: Path, groups_per_step: int = 1_024) -> float:
    """Return the CPU seconds of a try to lease after each group of a step."""
    buffer = make_buffer(folder / "tries.sqlite", groups_per_step=groups_per_step)
    ids = buffer.admit(1, queries(groups_per_step), 0)
    total = 0.0
    for group_id in ids[:-1]:
        buffer.ready(group(group_id))
        total += cpu_s(lambda: buffer.lease(0))
    buffer.ledger.close()
    return total


def many_ready(folder: Path) -> dict[str, float]:
    """Return the cost of expiry and lease, and the memory, with many ready groups."""
    buffer = make_buffer(folder / "ready.sqlite")
    made = [rollout(64) for _ in range(_GROUP)]
    with buffer.ledger.transaction():
        for group_id in buffer.admit(1, queries(_READY), 0):
            buffer.ready(group(group_id, *made))
    lineage = buffer.ledger.versions.lineage(0)
    found = {
        "expire_s": round(median(cpu_s(lambda: buffer.expire(lineage)) for _ in range(_ROUNDS)), 5),
        "lease_s": round(cpu_s(lambda: buffer.lease(0)), 4),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }
    buffer.ledger.close()
    return found


def main() -> int:
    collect_rarely()  # as the buffer's actor does
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        buffer = make_buffer(folder / "ledger.sqlite")
        by_run, by_size = {}, {}
        for num_groups in RUNS:
            age(buffer, num_groups)
            by_run[num_groups] = calls(buffer)
            by_size[num_groups] = whole(buffer, folder / "ledger.sqlite")
            print(
                f"{num_groups:,} groups:", {k: f"{1e3 * v:.3f} ms" for k, v in by_run[num_groups].items()},
                by_size[num_groups], flush=True,
            )  # fmt: skip
        buffer.ledger.close()
        by_length = {length: throughput(folder, length) for length in THROUGHPUT}
        print(by_length, flush=True)
        tries, ready = lease_tries_s(folder), many_ready(folder)
    missed = [
        f"{name}: {1e3 * last:.2f} ms after a million groups"
        for name, last in by_run[RUNS[-1]].items()
        if last > max(NOTICEABLE_S, FLAT * by_run[RUNS[0]][name])
    ]
    for length, found in by_length.items():
        if found["groups_per_cpu_s"] < THROUGHPUT[length]:
            missed.append(f"16 x {length}: {found['groups_per_cpu_s']} groups/CPU-s, not {THROUGHPUT[length]:g}")
        if found["written_per_byte"] > WRITTEN:
            missed.append(f"16 x {length}: {found['written_per_byte']} bytes written a byte, not {WRITTEN}")
    figures = {
        "calls_s": by_run,
        "whole": by_size,
        "by_length": by_length,
        "lease_tries_of_1024_s": round(tries, 3),
        "100k_ready": ready,
    }
    print(json.dumps(figures | {"missed": missed}))
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
