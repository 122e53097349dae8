"""Checks the ledger of a run that is to be continued, and replaces a damaged one by its copy in a checkpoint."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from quatro_ray.config import Config
from quatro_ray.engines.checkpoint_store import LEDGER, checkpoint_store
from quatro_ray.errors import ConfigError, LedgerError, LedgerUnreadable
from quatro_ray.files import sync
from quatro_ray.replay.schema import damage_of, read_only

_ASIDE = f"{LEDGER}.damaged"


@dataclass(frozen=True)
class _Damage:
    """Why the ledger cannot be used, and its copy that can take its place.

    Attributes:
        why: what is wrong with it.
        copy: the copy; None if there is none.
        step: step of the copy's checkpoint.
    """

    why: str
    copy: Path | None
    step: int


def check_ledger(config: Config) -> None:
    """Check that the run in `run.dir` has a ledger that can be continued, or a checkpoint with an intact copy.

    Raises:
        ConfigError: it has neither; or the ledger cannot be read, for example because another program has
            locked it.
    """
    damage = _damage(config)
    if damage is not None and damage.copy is None:
        raise ConfigError(
            f"run.dir={config.run.dir}: the run in it cannot be continued: {damage.why}, and no checkpoint has an "
            f"intact copy of it; restore {LEDGER} from a backup, or set run.overwrite=true and run.resume=never to "
            "begin anew"
        )


def restore_ledger(config: Config) -> str | None:
    """Replace the ledger by its copy in the newest checkpoint if it is missing, damaged, or older than that checkpoint.

    The damaged file is kept beside it. Groups admitted since the copy are admitted again under the same numbers.

    Returns:
        What was done, for the user; None if the ledger is whole.
    """
    damage = _damage(config)
    if damage is None or damage.copy is None:
        return None
    path = config.run.dir / LEDGER
    writing = path.with_name(f"{LEDGER}.writing")
    shutil.copyfile(damage.copy, writing)
    sync(writing)
    for suffix in ("-wal", "-shm", ""):  # the log belongs to the old file, and would be applied to the new one
        if path.with_name(LEDGER + suffix).exists():
            path.with_name(LEDGER + suffix).replace(path.with_name(_ASIDE + suffix))
    writing.replace(path)
    sync(path.parent)
    return f"{damage.why}; its copy in the checkpoint step_{damage.step} has taken its place"


def _damage(config: Config) -> _Damage | None:
    """Return what is wrong with the ledger; None if it is whole, or if the run never wrote one."""
    path, store = config.run.dir / LEDGER, checkpoint_store(config)
    steps = store.steps()
    why = _why(path, steps, (store.version_of(steps[0]) or 0) if steps else 0)
    if why is None:
        return None
    found = ((store.ledger_of(step), step) for step in steps)
    copy, step = next(((copy, step) for copy, step in found if copy is not None and _is_whole(copy)), (None, 0))
    return _Damage(why, copy, step)


def _is_whole(path: Path) -> bool:
    try:
        return damage_of(path) is None
    except LedgerError:  # of another version
        return False


def _why(path: Path, steps: list[int], version: int) -> str | None:
    has_trained = bool(steps) or _has_content(path.with_name("metrics.jsonl"))
    if not path.is_file():
        return f"{path} is missing" if has_trained else None
    if not (has_trained or _has_content(path)):
        return None
    try:
        if damage := _damage_of(path, _state(path), _state(path.with_name(f"{LEDGER}-wal"))):
            return f"{path} is damaged: {damage}"
        newest = _newest_version(path)
    except LedgerUnreadable as error:
        raise ConfigError(f"run.dir={path.parent}: the run in it cannot be continued: {error}") from error
    except LedgerError as error:
        return str(error)
    if newest < version:
        return f"{path} is older than the checkpoint step_{steps[0]} (its newest version is {newest}, not {version})"
    return None


@lru_cache(maxsize=4)
def _damage_of(path: Path, state: object, state_of_log: object) -> str | None:
    """Do as replay/schema.py:damage_of, once for each state of the file and its log."""
    return damage_of(path)


def _state(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_size


def _has_content(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _newest_version(path: Path) -> int:
    with read_only(path) as ledger:
        return int(ledger.execute("SELECT MAX(version) FROM versions").fetchone()[0])
