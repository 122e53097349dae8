"""Whether a directory may be trained into: nothing is replaced, or gone on with, by mistake."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from operator import attrgetter
from pathlib import Path

from quatro_ray.config import Config, dump_config, load_config
from quatro_ray.engines.checkpoint_store import checkpoint_store
from quatro_ray.errors import ConfigError

_LEDGER = "ledger.sqlite"
_OURS = "config.yaml"
"""A directory that holds this file is a run of ours: `overwrite` may replace it, and nothing else."""


def prepare_run_dir(config: Config) -> bool:
    """A directory with the resolved configuration in it: empty besides, or True where a run in it is to go on.

    Raises:
        ConfigError: it holds something, and neither `run.overwrite` nor `run.resume` is on or it is no run of ours; the
            run to be gone on with was another one, has more steps already, or is under way; or nothing can be written.
    """
    try:
        return _prepare(config)
    except OSError as error:
        raise ConfigError(
            f"run.dir={config.run.dir}, checkpoint.dir={config.checkpoint_dir}: cannot be used ({error}); choose others"
        ) from error


def _prepare(config: Config) -> bool:
    path = config.run.dir
    if config.run.resume == "auto" and (path / _OURS).is_file():
        with only_writer(config):
            check_same_run(load_config(path / _OURS), config)
            check_steps(config)
            (path / _OURS).write_text(dump_config(config))
        return (path / _LEDGER).is_file()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        if not config.run.overwrite:
            raise ConfigError(
                f"run.dir={path}: is not empty; choose another, or set run.overwrite=true to replace it, or "
                "run.resume=auto to go on with the run in it"
            )
        if not (path / _OURS).is_file():
            raise ConfigError(
                f"run.dir={path}: has no {_OURS}, so it is no earlier run, and is not replaced; choose another"
            )
        with only_writer(config):
            _check_checkpoint_dir(config)
            _empty(path)
    _check_checkpoint_dir(config)
    path.mkdir(parents=True, exist_ok=True)
    (path / _OURS).write_text(dump_config(config))
    return False


def _empty(path: Path) -> None:
    """It stays itself: it may be a mounted volume, or a link to one."""
    for child in path.iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child)
        else:
            child.unlink()


def _check_checkpoint_dir(config: Config) -> None:
    """Checkpoints in run.dir go with the run that is replaced; others are not ours to take or to remove."""
    folder = config.checkpoint.dir
    if folder is None or folder.is_relative_to(config.run.dir):
        return
    folder.mkdir(parents=True, exist_ok=True)
    if (step := checkpoint_store(config).newest_step()) is not None:
        raise ConfigError(
            f"checkpoint.dir={folder}: has a checkpoint of another run (step_{step}); choose another folder, "
            "or remove it"
        )


def check_same_run(before: Config, now: Config) -> None:
    """Raises ConfigError where something differs without which the ledger or the checkpoints mean nothing."""
    same = ["run.seed", "model", "data", "replay.group_size", "replay.groups_per_step", "checkpoint.dir"]
    # what a checkpoint brings with it, so that another value would do nothing
    same += [f"learner.{name}" for name in ("dtype", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2")]
    for name in same:
        old, new = attrgetter(name)(before), attrgetter(name)(now)
        if old != new:
            raise ConfigError(
                f"{name}: differs from that of the run in {now.run.dir}, which is to go on; set it as it was, or "
                "choose another run.dir"
            )


def check_steps(config: Config) -> None:
    """Raises ConfigError where the run that is to go on is past its end."""
    done, wanted = checkpoint_store(config).newest_step(), config.run.num_steps
    if done is not None and done > wanted:
        raise ConfigError(
            f"run.num_steps={wanted}: the run in {config.run.dir} has a checkpoint of step {done}; set at least that, "
            "or choose another run.dir"
        )


@contextmanager
def only_writer(config: Config) -> Iterator[None]:
    """Raises ConfigError where another process trains in run.dir, or writes its checkpoints into checkpoint.dir."""
    with ExitStack() as locks:
        for name, folder in (("run.dir", config.run.dir), ("checkpoint.dir", config.checkpoint.dir)):
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                lock = locks.enter_context((folder / ".writer").open("w"))
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise ConfigError(
                        f"{name}={folder}: another run writes here; end it first, or choose another"
                    ) from error
        yield
