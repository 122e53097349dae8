"""Checks whether a run directory may be trained into, so that no run is replaced or continued by mistake."""

from __future__ import annotations

import fcntl
import json
import logging
import shutil
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import IO

from quatro_ray.config import Config, Section, dump_config, load_config
from quatro_ray.engines.checkpoint_store import LEDGER, checkpoint_store
from quatro_ray.errors import ConfigError, LedgerUnreadable
from quatro_ray.files import replace_file
from quatro_ray.jobs.ledger_file import check_ledger, restore_ledger
from quatro_ray.jobs.writer_token import FILE as WRITER
from quatro_ray.jobs.writer_token import WriterToken, other_host
from quatro_ray.replay.schema import read_only
from quatro_ray.telemetry.now_file import read_now
from quatro_ray.telemetry.run_files import records_of

_INPUTS = "inputs.json"
_LOCK = ".writer"
_LOCK_TRIES, _LOCK_AGAIN_S = 5, 0.01
"""`is_in_use` holds the lock too, for an instant, which must not keep a run from starting."""
_LOOK_EVERY_S, _SAY_EVERY_S = 1.0, 10.0
"""Seconds between two tries, and between two messages, if an older attempt holds the lock."""
_AFTER_CHECKPOINT_S = 60.0
"""Seconds beyond `checkpoint.grace_s` that an older attempt may take to end."""
_RESOLVED_CONFIG = "config.yaml"
"""Marks a directory as a run: `run.overwrite` replaces only a directory that holds this file."""

_RESULTS = frozenset({"metrics.jsonl", "rollouts.jsonl"})
"""The files to which a run adds with each step; empty before the first."""
_LEFT_BY_A_START = _RESULTS | {
    "checkpoints", "config.yaml", "config.yaml.writing", "evaluation_rollouts.jsonl", "evaluations.jsonl",
    "events.jsonl", "inputs.json", "inputs.json.writing", "ledger.host", "ledger.host.writing", "ledger.rollouts",
    "ledger.sqlite", "ledger.sqlite-shm", "ledger.sqlite-wal", "model", "model.writing", "notes.log", "now.json",
    "now.json.writing", "stall.txt", "swanlog", "tensorboard", "timeline.jsonl", "timeline.1.jsonl", "trackers.json",
    "trackers.json.writing", "wandb",
}  # fmt: skip
"""All that a run may have written before it admitted its first group."""

_logger = logging.getLogger(__name__)


def check_run_dir(config: Config, inputs: Mapping[str, str] | None = None) -> None:
    """Check what `prepare_run_dir` checks, and leave no trace of it.

    Args:
        config: as `prepare_run_dir` takes it.
        inputs: as `prepare_run_dir` takes them; None if they are not known.

    Raises:
        ConfigError: as `prepare_run_dir` raises it, except that locks of other processes are not looked at.
    """
    with _usable(config):
        for folder in {config.run.dir, config.checkpoint_dir}:
            _check_writable(folder)
        _check_content(config, inputs or {})


def prepare_run_dir(config: Config, inputs: Mapping[str, str] | None = None) -> bool:
    """Do what `claim_run_dir` does, but do not hold the directory."""
    with claim_run_dir(config, inputs) as claim:
        return claim.resumes


@dataclass(frozen=True)
class Claim:
    """A run directory that this process holds.

    Attributes:
        resumes: a run in the directory is to be resumed. Otherwise the directory holds only the configuration.
        restored: a message if the ledger was replaced by its copy in a checkpoint, else None.
        token: tells whether this process is still the newest writer.
    """

    resumes: bool
    restored: str | None
    token: WriterToken


@contextmanager
def claim_run_dir(
    config: Config, inputs: Mapping[str, str] | None = None, say: Callable[[str], None] = _logger.warning
) -> Iterator[Claim]:
    """Create or claim `run.dir`, write the resolved configuration into it, and hold it inside the `with` block.

    No other process writes between the checks and the end of the block.

    Args:
        config: the resolved configuration.
        inputs: fingerprints of data and model (jobs/fingerprints.py); None if they are not known.
        say: called with a message if an older attempt on another machine is waited for.

    Raises:
        ConfigError: the directory is not empty and neither `run.overwrite` nor `run.resume` allows its use; it does not
            hold a run; the run in it has another configuration, has more steps already, or is in use by another
            process; or it cannot be written.
        TakenOver: another attempt came at the same moment.
    """
    with ExitStack() as held:
        with _usable(config):
            _check_content(config, inputs or {})  # so that a refused start leaves no trace
            held.enter_context(only_writer(config, say))
            token = held.enter_context(WriterToken.take(config.run.dir, say))
            claim = _prepare(config, inputs or {}, token)
        yield claim


@contextmanager
def _usable(config: Config) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"run.dir={config.run.dir}, checkpoint.dir={config.checkpoint_dir}: cannot be used ({error}); choose others"
        ) from error


def _check_writable(folder: Path) -> None:
    """Create a folder in the nearest directory that exists, and remove it. Raises OSError if that is impossible."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    Path(tempfile.mkdtemp(prefix=".quatro_ray_", dir=there)).rmdir()


def _prepare(config: Config, inputs: Mapping[str, str], token: WriterToken) -> Claim:
    """Check again what `run.dir` holds, because another process may have written before this one held it."""
    path, restored = config.run.dir, None
    _check_content(config, inputs)
    if resumes := _resumes(config):
        _logger.info("run.dir=%s: resuming the run in it", path)
        restored = restore_ledger(config)
    elif _content(path):
        _logger.info("run.dir=%s: replacing the run in it", path)
        _empty(path)
    _write(path, config, inputs)
    return Claim(resumes and (path / LEDGER).is_file(), restored, token)


def _write(path: Path, config: Config, inputs: Mapping[str, str]) -> None:
    replace_file(path / _RESOLVED_CONFIG, dump_config(config))
    if inputs:
        replace_file(path / _INPUTS, json.dumps(inputs, indent=2) + "\n")


def read_inputs(path: Path) -> dict[str, str]:
    """Return the fingerprints of what the run in a directory reads; empty for a run from before they were written."""
    file = path / _INPUTS
    if not file.is_file():
        return {}
    try:
        inputs: dict[str, str] = json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f"{file}: is not JSON ({error}); remove it if data and model are unchanged") from error
    return inputs


def _check_same_inputs(config: Config, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raise ConfigError if data or model, whose place may have changed, have another content than before."""
    for name in sorted(before.keys() & now.keys()):
        if before[name] != now[name]:
            raise ConfigError(
                f"{name}: its content differs from that with which the run in {config.run.dir} began (fingerprint "
                f"{before[name][:12]} before, {now[name][:12]} now), which run.resume=auto would continue; restore "
                "it, or choose another run.dir"
            )


def _resumes(config: Config) -> bool:
    """Return whether the run in the directory is to be continued; one that failed to start may begin anew instead."""
    path = config.run.dir
    if config.run.resume != "auto" or not (path / _RESOLVED_CONFIG).is_file():
        return False
    if not _failed_to_start(path):
        return True
    try:
        check_same_run(load_config(path / _RESOLVED_CONFIG), config)
    except ConfigError:  # nothing depends on the earlier configuration, which has just been corrected
        return False
    return True


def _check_content(config: Config, inputs: Mapping[str, str]) -> None:
    """Raise ConfigError if what is in `run.dir` and `checkpoint.dir` forbids their use."""
    path = config.run.dir
    if _resumes(config):
        before = read_inputs(path)
        check_same_run(load_config(path / _RESOLVED_CONFIG), config, before, inputs)
        _check_same_inputs(config, before, inputs)
        check_steps(config)
        check_ledger(config)
        return
    if path.exists() and (not path.is_dir() or _content(path)) and not _failed_to_start(path):
        if not config.run.overwrite:
            raise ConfigError(
                f"run.dir={path}: is not empty; choose another, or set run.overwrite=true to replace it, or "
                "run.resume=auto to continue the run in it"
            )
        if not (path / _RESOLVED_CONFIG).is_file():
            raise ConfigError(
                f"run.dir={path}: has no {_RESOLVED_CONFIG}, so it is not a run, and run.overwrite does not replace "
                "it; choose another"
            )
    _check_checkpoint_dir(config)


def _failed_to_start(path: Path) -> bool:
    """Return whether the directory holds a run that never admitted a group, and nothing else, so nothing is lost."""
    if not path.is_dir() or not (path / _RESOLVED_CONFIG).is_file():
        return False
    if any(child.name not in _LEFT_BY_A_START or _holds_results(child) for child in _content(path)):
        return False
    if not (path / LEDGER).is_file():
        return True
    try:
        with read_only(path / LEDGER) as ledger:
            return bool(ledger.execute("SELECT COUNT(*) FROM groups").fetchone() == (0,))
    except (sqlite3.Error, LedgerUnreadable):  # it cannot be read, so nothing says that it is empty
        return False


def _holds_results(child: Path) -> bool:
    if child.name == "checkpoints":
        return any(child.iterdir())
    return child.name in _RESULTS and child.stat().st_size > 0


def _content(path: Path) -> list[Path]:
    """Return what a directory holds, without the files that tell who writes there: they are no part of a run."""
    return [child for child in path.iterdir() if child.name != _LOCK and not child.name.startswith(WRITER)]


def _empty(path: Path) -> None:
    """Delete the content of a directory but not the directory: it may be a mounted volume, or a link to one."""
    for child in _content(path):
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()


def _check_checkpoint_dir(config: Config) -> None:
    """Raise ConfigError if `checkpoint.dir` is outside `run.dir` and holds checkpoints of another run.

    Checkpoints inside `run.dir` belong to the run that is replaced.
    """
    folder = config.checkpoint.dir
    if folder is None or folder.is_relative_to(config.run.dir):
        return
    if (step := checkpoint_store(config).newest_step()) is not None:
        raise ConfigError(
            f"checkpoint.dir={folder}: has a checkpoint of another run (step_{step}); choose another folder, "
            "or remove it"
        )


def check_same_run(
    before: Config, now: Config, inputs_before: Mapping[str, str] | None = None, inputs: Mapping[str, str] | None = None
) -> None:
    """Check that no field differs that the ledger and the checkpoints depend on.

    Args:
        before: configuration of the run in the directory.
        now: configuration that is to continue it.
        inputs_before: fingerprints of that run's data and model. If they are known, their paths may differ.
        inputs: fingerprints of data and model as they are now.

    Raises:
        ConfigError: a field differs; the message has both values.
    """
    same = ["run.seed", "model", "data", "replay.group_size", "replay.groups_per_step", "checkpoint.dir"]
    same += ["learner.lora"]  # the adapters in a checkpoint mean another policy with another factor
    # these are restored from the checkpoint, so that another value would have no effect
    same += [f"learner.{name}" for name in ("dtype", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2")]
    by_content = {name for name in inputs_before or {} if name in (inputs or {})}
    for name in same:
        old, new = (dict(_leaves(name, attrgetter(name)(config))) for config in (before, now))
        for field in sorted(old.keys() | new.keys()):
            if old.get(field) != new.get(field) and not (field.endswith(".path") and field[:-5] in by_content):
                raise ConfigError(
                    f"{field}: differs from that of the run in {now.run.dir} ({old.get(field)!r} before, "
                    f"{new.get(field)!r} now), which run.resume=auto would continue; restore the earlier value, or "
                    "choose another run.dir"
                )


def _leaves(path: str, value: object) -> Iterator[tuple[str, object]]:
    """Yield the path and value of every field below a section."""
    if isinstance(value, Section):
        value = value.model_dump(mode="json")
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _leaves(f"{path}.{name}", inner)
    else:
        yield path, value


def check_steps(config: Config) -> None:
    """Raise ConfigError if the run to resume has lost its checkpoints, or has one beyond `run.num_steps`."""
    store, wanted = checkpoint_store(config), config.run.num_steps
    done = store.newest_step()
    if done is None and not store.damaged() and (lost := _last_written(config.run.dir)) is not None:
        raise ConfigError(
            f"checkpoint.dir={config.checkpoint_dir}: has no checkpoint, but the run in {config.run.dir} has written "
            f"that of step {lost}; mount or restore the folder, or begin again from step 0 with run.resume=never and "
            "run.overwrite=true"
        )
    if done is not None and done > wanted:
        raise ConfigError(
            f"run.num_steps={wanted}: the run in {config.run.dir} has a checkpoint of step {done}; set at least that, "
            "or choose another run.dir"
        )


def _last_written(run_dir: Path) -> object:
    """Return the step of the checkpoint that was written last, or None if none was."""
    events = records_of(run_dir, "events.jsonl", Counter())
    written = [e for e in events if (e["event"], e["part"]) == ("written", "checkpoint")]
    return written[-1].get("step") if written else None


@contextmanager
def only_writer(config: Config, say: Callable[[str], None] = _logger.warning) -> Iterator[None]:
    """Hold an exclusive lock on `run.dir` and `checkpoint.dir`.

    With `run.resume=auto`, an attempt on another machine or in another pod, such as the pod that this one replaces, may
    still write its last checkpoint. It is waited for.

    Args:
        config: names the directories.
        say: called with a message while an older attempt is waited for.

    Raises:
        ConfigError: another process holds a lock.
    """
    with ExitStack() as locks:
        for name, folder in (("checkpoint.dir", config.checkpoint.dir), ("run.dir", config.run.dir)):
            # a folder within run.dir has the lock of run.dir
            if folder is not None and (folder == config.run.dir or not folder.is_relative_to(config.run.dir)):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                lock = locks.enter_context((folder / _LOCK).open("w"))
                if not (_lock(lock, fcntl.LOCK_EX, tries=_LOCK_TRIES) or _lock_after_older(lock, config, say)):
                    raise ConfigError(f"{name}={folder}: another run writes here; end it first, or choose another")
        yield


def _lock_after_older(file: IO[str], config: Config, say: Callable[[str], None]) -> bool:
    """Wait for the lock while an attempt elsewhere may be ending; return whether it was taken."""
    host = other_host(config.run.dir) if config.run.resume == "auto" else None
    begun, said = time.monotonic(), -_SAY_EVERY_S
    deadline_s = config.checkpoint.grace_s + _AFTER_CHECKPOINT_S
    while host is not None and (waited_s := time.monotonic() - begun) < deadline_s:
        if waited_s - said >= _SAY_EVERY_S:
            left = f"it has {deadline_s - waited_s:.0f} s to write its checkpoint and end"
            say(f"run.dir={config.run.dir}: an earlier attempt on {host} still writes here; {left}")
            said = waited_s
        if _lock(file, fcntl.LOCK_EX, tries=1):
            return True
        time.sleep(_LOOK_EVERY_S)
    return False


def is_in_use(run_dir: Path) -> bool:
    """Return whether a process trains into the directory now; one on another machine may have a lock not seen here."""
    now = read_now(run_dir)
    if now is not None and now.is_alive_elsewhere():
        return True
    try:
        lock = (run_dir / _LOCK).open()
    except FileNotFoundError:
        return False
    with lock:
        return not _lock(lock, fcntl.LOCK_SH, tries=1)


def _lock(file: IO[str], kind: int, tries: int) -> bool:
    """Return whether the lock was taken; it is held until the file is closed."""
    for left in reversed(range(tries)):
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if left:
                time.sleep(_LOCK_AGAIN_S)
    return False
