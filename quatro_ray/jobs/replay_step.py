"""Makes one learner step of a run again, from a checkpoint and the rollouts in the ledger, without engines."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import ray
from ray.exceptions import RayError

from quatro_ray.config import Config, TinyModelConfig, load_config
from quatro_ray.engines.checkpoint_store import LEDGER, checkpoint_store
from quatro_ray.errors import ClusterError, ConfigError, LedgerError, last_line
from quatro_ray.files import replace_file
from quatro_ray.jobs.run_directory import is_in_use
from quatro_ray.orchestrator.cluster import make_learner
from quatro_ray.orchestrator.connection import connect
from quatro_ray.orchestrator.placement import Placer
from quatro_ray.orchestrator.resources import learner_bundles
from quatro_ray.replay import serialization
from quatro_ray.replay.buffer import LeasedBatch
from quatro_ray.replay.ledger import Ledger
from quatro_ray.replay.ledger_reader import check_host
from quatro_ray.replay.schema import read_only
from quatro_ray.replay.staleness import Lineage
from quatro_ray.telemetry.run_files import records_of
from quatro_ray.types import GroupState, StepMetrics

_MEASURED = ("time/", "memory/")
"""Metrics that are measured and not computed."""


def replay_step(
    run_dir: Path,
    step: int,
    say: Callable[[str], None],
    *,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    verbose: bool = False,
) -> dict[str, tuple[object, object]]:
    """Train from the newest checkpoint before a step up to that step, and compare its metrics with the recorded ones.

    The run's files are only read, so that the run may be finished, crashed or in progress.

    Args:
        run_dir: directory of the run.
        step: the optimiser step, from 1 on.
        say: shows a line.
        overrides: of the run's configuration, such as `cluster.address=null`, as `load_config` takes them.
        out: folder for the metrics and the readable rollouts of the step, and for an export of the weights after it.
        verbose: show the output of the ranks.

    Returns:
        The recorded and the new value of each metric that differs. Empty if the step is the same bit for bit.

    Raises:
        ConfigError: the directory holds no run, or the run has no such step, or its checkpoint or rollouts are gone or
            damaged.
        ClusterError: the learner cannot be placed or started, or failed.
    """
    config = _config_of(run_dir, overrides)
    recorded = _recorded(run_dir, step)
    if is_in_use(run_dir):
        check_host(run_dir / LEDGER)
    if out is not None:
        _make_folder(out)
    with _private_ledger(run_dir / LEDGER) as ledger:
        plan = _Plan.make(config, ledger, step)
        say(plan.text())
        try:
            connect(config, show_actor_logs=verbose)
            metrics = asyncio.run(_replay(config, plan, say, out))
        except RayError as error:
            raise ClusterError(f"an actor failed: {last_line(error)}") from error
        finally:
            ray.shutdown()
        if out is not None:
            readable = [serialization.readable(group) for group in plan.batch(step).groups]
            replace_file(out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
            replace_file(out / "rollouts.json", json.dumps(readable, indent=2, ensure_ascii=False) + "\n")
    return differences(recorded, metrics)


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise ConfigError(f"--out={out}: cannot be written ({error}); choose another folder") from error


def differences(recorded: Mapping[str, object], metrics: StepMetrics) -> dict[str, tuple[object, object]]:
    """Return both values of each computed metric of a step that differs from the recorded one.

    Lists, of which metrics.jsonl has six digits, are not compared.
    """
    read_back = json.loads(json.dumps(metrics))
    compared = {
        name: value
        for name, value in read_back.items()
        if not name.startswith(_MEASURED) and not isinstance(value, list | dict)
    }
    return {name: (recorded.get(name), value) for name, value in compared.items() if recorded.get(name) != value}


class _Plan:
    """The checkpoint from which to begin, and the batches of all steps from there.

    Attributes:
        step: the step that is asked for.
        begin: step of the checkpoint; 0 for the starting policy.
        folder: the checkpoint; None for the starting policy.
        versions: the version from which each step trains.
    """

    def __init__(self, ledger: Ledger, step: int, begin: int, folder: Path | None, versions: Mapping[int, int]) -> None:
        self._ledger = ledger
        self.step, self.begin, self.folder, self.versions = step, begin, folder, versions

    @classmethod
    def make(cls, config: Config, ledger: Ledger, step: int) -> _Plan:
        """Choose the newest checkpoint before `step`; raise ConfigError if it is damaged, or rollouts are gone."""
        store = checkpoint_store(config)
        begin = next((at for at in store.steps() if at < step), 0)
        lineage = ledger.versions.lineage(ledger.versions.newest())
        if not 1 <= step <= lineage.step:
            raise ConfigError(f"STEP={step}: the run has steps 1 to {lineage.step}; choose one of them")
        versions = {s: _version_at(lineage, s - 1) for s in range(begin + 1, step + 1)}
        folder = config.checkpoint_dir / f"step_{begin}" if begin else None
        plan = cls(ledger, step, begin, folder, versions)
        for made, version in versions.items():
            trained = ledger.of_learner(GroupState.TRAINED, version)
            if not trained or not all(ledger.has_payload(entry.group_id) for entry in trained):
                raise ConfigError(
                    f"STEP={step}: the newest checkpoint before it is that of step {begin}, and the rollouts of step "
                    f"{made} are freed; choose a step after the oldest checkpoint, or name the step in "
                    f"replay.keep_steps before it is made"
                )
        if begin and (damage := store.damage_of(begin, thorough=True)):
            raise ConfigError(
                f"STEP={step}: the newest checkpoint before it, {folder}, cannot be used: {damage}; restore it from a "
                "backup, or choose a step after another checkpoint"
            )
        return plan

    def batch(self, step: int) -> LeasedBatch:
        """Return the batch of a step, in the order in which it was leased; raise ConfigError if it cannot be read."""
        version = self.versions[step]
        entries = self._ledger.of_learner(GroupState.TRAINED, version)
        try:
            groups = tuple(serialization.from_bytes(self._ledger.payload(entry.group_id)) for entry in entries)
        except LedgerError as error:
            raise ConfigError(
                f"STEP={self.step}: needs the rollouts of step {step}, and files in ledger.rollouts of the run are "
                "missing or damaged; restore them, or choose another step"
            ) from error
        return LeasedBatch(groups, self._ledger.versions.lineage(version))

    def text(self) -> str:
        """Return what is done, in words."""
        source = f"the checkpoint {self.folder.name}" if self.folder else "the starting policy"
        return f"replaying step {self.begin + 1} to {self.step} from {source}"


def _version_at(lineage: Lineage, step: int) -> int:
    """Return the last version of a lineage that has made this many steps: that from which the next step trained."""
    stretch = next(s for s in reversed(lineage.stretches) if s.step <= step)
    return stretch.first + step - stretch.step


async def _replay(config: Config, plan: _Plan, say: Callable[[str], None], out: Path | None) -> StepMetrics:
    place = await Placer.reserve(config, learner_bundles(config), say)
    learner = make_learner(place, _starting_policy(config))
    metrics: StepMetrics = {}
    try:
        await learner.start()
        first = plan.versions[plan.begin + 1]
        if plan.folder is None:
            await learner.set_version(first)
        else:
            await learner.load_checkpoint(plan.folder, first)
        for step, version in plan.versions.items():
            if step > plan.begin + 1:
                await learner.set_version(version)  # another one if the run fell back to this step
            metrics = await learner.train_step(ray.put(plan.batch(step)), version)
            say(f"step {step}: replayed")
        if out is not None:
            await learner.export(out / "export", config.checkpoint.deadline_s)
    finally:
        learner.kill()
        place.release()
    return metrics


def _starting_policy(config: Config) -> str:
    if isinstance(config.model, TinyModelConfig):
        return str(config.run.dir / "model")
    return config.model.path


def _config_of(run_dir: Path, overrides: Sequence[str]) -> Config:
    path = run_dir / "config.yaml"
    if not path.is_file() or not (run_dir / LEDGER).is_file():
        raise ConfigError(f"{run_dir}: has no config.yaml and {LEDGER}, so it is not a run; give a run's directory")
    return load_config(path, [f"run.dir={json.dumps(str(run_dir.absolute()))}", *overrides])


def _recorded(run_dir: Path, step: int) -> Mapping[str, object]:
    last = 0
    for record in records_of(run_dir, "metrics.jsonl", Counter()):
        if record["step"] == step:
            return record
        last = record["step"]
    there = f"choose one from 1 to {last}" if last else "it has none yet; choose another run"
    raise ConfigError(f"STEP={step}: {run_dir}/metrics.jsonl has no such step; {there}")


@contextmanager
def _private_ledger(path: Path) -> Iterator[Ledger]:
    """Open a copy of a ledger, with the rollouts of the original: opening that itself would take it from its run."""
    with tempfile.TemporaryDirectory(prefix="quatro_ray_replay_") as folder:
        copy = Path(folder) / path.name
        try:
            with read_only(path) as source, closing(sqlite3.connect(copy)) as target:
                source.backup(target)
        except sqlite3.Error as error:
            raise LedgerError(f"{path}: cannot be read ({error})") from error
        copy.with_suffix(".rollouts").symlink_to(path.with_suffix(".rollouts").absolute())
        with closing(Ledger(copy)) as ledger:
            yield ledger
