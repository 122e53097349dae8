"""Training under real faults: time to detect and to recover, and an audit of all records.

    python -m benchmarks.chaos --seed 0                      # every kind once
    python -m benchmarks.chaos --seed 0 --minutes 60         # for an hour from the first fault

Runs `quatro-ray train` and kills, stops, starves and damages its components one after the other, each after the run has
recovered from the previous fault. If the command ends before the run is done, it is started again, as a cluster would.
Runs follow each other until the time is over; each is finished and audited. The kinds with a full disk need root.
Prints a table, then one JSON line. The exit status is 0 only if nothing was lost or duplicated, every audit passed, and
every kind that was asked for was injected at least once and recovered from.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.faults.audit import audit
from benchmarks.faults.disk import Disk
from benchmarks.faults.kinds import CONFIG_ON_FULL_DISK, DISK_FULL, KINDS, Kind
from benchmarks.faults.processes import describe, remove_shared_memory, shared_memory
from benchmarks.faults.records import read_json, read_lines
from benchmarks.faults.report import figures, table
from benchmarks.faults.run import Run
from benchmarks.faults.schedule import GaveUp, Schedule
from benchmarks.faults.watch import Outcome
from quatro_ray.config import Config, load_config
from quatro_ray.jobs.audit_checks import Books
from quatro_ray.replay.ledger_reader import read_rows

CONFIG = Path(__file__).parents[1] / "configs" / "chaos.yaml"
_ACCURACY_WITHIN = 0.03
_CALM_END_STEPS = 80
_DISK_IN_CHECKPOINTS = 5
_HOME_BYTES = 2**30


@dataclass
class Result:
    """The result of `run_chaos`. `runs` holds the findings of each run's audit by check, and its accuracy."""

    outcomes: list[Outcome]
    kinds: list[str]
    skipped: dict[str, str]
    runs: list[dict[str, Any]] = field(default_factory=list)
    baseline: dict[str, Any] = field(default_factory=dict)
    gave_up: str = ""

    def failures(self) -> list[str]:
        """Return the reasons why the exit status is not 0."""
        by_kind = figures(self.outcomes, self.kinds)
        found = [self.gave_up] if self.gave_up else []
        for index, run in enumerate(self.runs):
            found += [f"run {index}, {check}: {w[0]} ({len(w)} findings)" for check, w in run["audit"].items() if w]
        for kind, of in by_kind.items():
            found += [f"{kind}: {n} groups {what}" for what in ("lost", "duplicated") if (n := of[what])]
            if of["not_recovered"]:
                found.append(f"{kind}: not recovered from {of['not_recovered']} times")
            if not of["injected"]:
                found.append(f"{kind}: never injected")
        return found + [f"{kind}: cannot be injected here ({why})" for kind, why in self.skipped.items()]

    def record(self) -> dict[str, Any]:
        own = {k: v for k, v in vars(self).items() if k != "outcomes"}
        return own | {"faults": figures(self.outcomes, self.kinds), "failures": self.failures()}


def run_chaos(
    work: Path,
    kinds: Sequence[str] | None = None,
    max_faults: int | None = None,
    *,
    minutes: float | None = None,
    seed: int = 0,
    config: Path = CONFIG,
    overrides: Sequence[str] = (),
    baseline: Path | None = None,
    say: Callable[[str], None] = print,
) -> Result:
    """Train under faults until the minutes or the faults are used up, then let the current run finish.

    Args:
        work: an empty or new folder; everything is written there.
        kinds: names of KINDS; None: all.
        max_faults: number of faults; None: one of each kind, unless `minutes` are given.
        minutes: they begin with the first fault; None: as long as the faults take.
        baseline: a JSON file with the figures of a run without faults. If it does not exist, the run is made first and
            its figures are kept there. None: `work`/baseline.json.

    Raises:
        ValueError: an unknown kind, or the configuration is wrong.
    """
    chosen = _chosen(kinds)
    loaded = load_config(config, ["run.dir=unused", *overrides])
    work = work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    with _temporary_folder() as temp:
        kept = baseline or work / "baseline.json"
        calm = read_json(kept) if kept.is_file() else _run_baseline(kept, config, overrides, temp, say)
        if Path(calm["model"]).is_dir():  # reuse the starting policy instead of warming it up again
            overrides = [*overrides, f"model={{kind: pretrained, path: {calm['model']}}}"]
        with _disks(work, chosen, calm["checkpoint_bytes"]) as (disks, skipped):
            able = [k for k in chosen if k.name not in skipped]
            most = max_faults or (len(able) if minutes is None else 10**6)
            schedule = Schedule(able, seed, minutes, most, work / "faults.jsonl", say)
            result = Result(schedule.outcomes, [k.name for k in able], skipped, baseline=dict(calm))
            while not result.runs or not schedule.is_over():
                folder = work / f"run_{len(result.runs)}"
                num_before = len(schedule.outcomes)
                run = Run(config, overrides, folder, temp, disks.get(DISK_FULL), disks.get(CONFIG_ON_FULL_DISK))
                _one_run(run, schedule, loaded, result)
                if not result.gave_up and len(schedule.outcomes) == num_before:
                    result.gave_up = "no fault could be injected in a whole run"
                if result.gave_up:
                    break
    return result


def _chosen(names: Sequence[str] | None) -> list[Kind]:
    known = {k.name: k for k in KINDS}
    if unknown := sorted(set(names or ()) - set(known)):
        raise ValueError(f"unknown kinds {unknown}; there are {sorted(known)}")
    return [known[name] for name in names or known]


@contextmanager
def _temporary_folder() -> Iterator[Path]:
    """Create a folder for Ray's sessions; its path is short because the path of a socket may have 107 bytes at most."""
    path = Path(f"/tmp/qc{os.getpid()}")
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _disks(
    work: Path, kinds: Sequence[Kind], checkpoint_bytes: int
) -> Iterator[tuple[dict[str, Disk], dict[str, str]]]:
    """Mount a disk for each kind that fills one; also yield the kinds that cannot be injected, with the reason."""
    sizes = {DISK_FULL: _DISK_IN_CHECKPOINTS * checkpoint_bytes, CONFIG_ON_FULL_DISK: _HOME_BYTES}
    asked = {kind.name for kind in kinds}
    disks: dict[str, Disk] = {}
    skipped: dict[str, str] = {}
    with ExitStack() as mounted:
        for kind, size in sizes.items():
            if kind not in asked:
                continue
            disk = Disk(work / kind.replace(" ", "_"), size)
            try:
                disk.mount()
            except OSError as error:
                skipped[kind] = str(error)
            else:
                mounted.callback(disk.unmount)
                disks[kind] = disk
        yield disks, skipped


def _run_baseline(
    kept: Path, config: Path, overrides: Sequence[str], temp: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """Train once without faults, and keep the figures. Raises GaveUp if even that fails."""
    say("first, the same run without faults")
    begun = time.monotonic()
    run = Run(config, overrides, kept.absolute().with_suffix(""), temp, disk=None)
    try:
        run.start()
        while run.status() is None:
            run.look()
            time.sleep(1)
        if not run.is_done():
            raise GaveUp(f"the run without faults ended with status {run.status()}: {run.last_words()}")
        orphans = run.clean_up()
    finally:
        run.close()
    sizes = [sum(f.stat().st_size for f in p.iterdir()) for p in run.newest_checkpoints()]
    calm = {
        "pass_at_1": read_json(run.dir / "summary.json")["pass_at_1_end"],
        "checkpoint_bytes": max(sizes),
        "model": str(run.dir / "model"),
        "seconds": round(time.monotonic() - begun, 1),
        "orphans": orphans,
    }
    kept.write_text(json.dumps(calm))
    say(f"without faults: pass@1 {calm['pass_at_1']:.3f} in {calm['seconds']:.0f} s")
    return calm


def _one_run(run: Run, schedule: Schedule, config: Config, result: Result) -> None:
    """Play one run to its end and audit it; leftover processes and shared memory are recorded and removed."""
    segments = shared_memory()
    orphans: list[str] = []
    try:
        schedule.play(run, len(result.runs), config.run.num_steps - _CALM_END_STEPS)
        orphans = run.clean_up()
    except GaveUp as error:
        result.gave_up = str(error)
    finally:
        left = describe(run.family.alive())
        run.close()
        if run.disk is not None:
            shutil.rmtree(run.checkpoints, ignore_errors=True)  # space for the checkpoints of the next run
        leaks = sorted((run.family.shm & shared_memory()) - segments)
        remove_shared_memory(leaks)
    books = Books(
        ledger=read_rows(run.dir / "ledger.sqlite"),
        metrics=read_lines(run.dir / "metrics.jsonl"),
        rollouts=[{k: r[k] for k in ("step", "group_id")} for r in read_lines(run.dir / "rollouts.jsonl")],
        evaluations=read_lines(run.dir / "evaluations.jsonl"),
        events=run.events,
        summary=read_json(run.dir / "summary.json"),
        num_steps=config.run.num_steps,
        groups_per_step=config.replay.groups_per_step,
        max_staleness=config.replay.max_staleness,
        rollouts_per_step=config.telemetry.rollout_groups_per_step,
        is_finished=True,
    )
    run.keep()
    found = audit(books, run.snapshots) | {"processes": orphans or left, "shared_memory": leaks}
    result.runs.append({"dir": str(run.dir), "audit": found, "starts": run.num_starts, **_accuracy(books, result)})


def _accuracy(books: Books, result: Result) -> dict[str, Any]:
    """Return the accuracy for the report only: sampling alone makes two runs differ by some hundredths."""
    if not books.summary:
        return {}
    accuracy, calm = books.summary["pass_at_1_end"], result.baseline["pass_at_1"]
    return {
        "pass_at_1": accuracy,
        "accuracy_missed": accuracy < calm - _ACCURACY_WITHIN,
        "recovery": books.summary["recovery"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=None, help="from the first fault; default: each kind once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--work", type=Path, default=None, help="default: runs/chaos_SEED_TIME")
    parser.add_argument("--kinds", nargs="+", default=None, help=", ".join(k.name for k in KINDS))
    parser.add_argument("--max-faults", type=int, default=None)
    parser.add_argument("--baseline", type=Path, default=None, help="file that keeps the run without faults")
    parser.add_argument("--set", nargs="+", default=[], help="section.field=value …")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("received SIGTERM"))  # so that every `finally` runs
    work = given.work or Path("runs") / f"chaos_{given.seed}_{int(time.time())}"
    result = run_chaos(
        work, given.kinds, given.max_faults, minutes=given.minutes, seed=given.seed, config=given.config,
        overrides=given.set, baseline=given.baseline, say=lambda text: print(text, flush=True),
    )  # fmt: skip
    print(table(figures(result.outcomes, result.kinds)))
    for failure in result.failures():
        print(f"failed: {failure}")
    print(json.dumps(result.record()))
    (work / "result.json").write_text(json.dumps(result.record(), indent=2))
    return 1 if result.failures() else 0


if __name__ == "__main__":
    sys.exit(main())
