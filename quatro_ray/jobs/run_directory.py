"""Checks whether a run directory may be trained into, so that no run is replaced or continued by mistake."""

from __future__ import annotations

import fcntl
import logging
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from operator import attrgetter
from pathlib import Path

from quatro_ray.config import Config, dump_config, load_config
from quatro_ray.engines.checkpoint_store import checkpoint_store
from quatro_ray.errors import ConfigError

_LEDGER = "ledger.sqlite"
_RESOLVED_CONFIG = "config.yaml"
"""Marks a directory as a run: `run.overwrite` replaces only a directory that holds this file."""

_logger = logging.getLogger(__name__)


def prepare_run_dir(config: Config) -> bool:
    """Create or claim `run.dir`, and write the resolved configuration into it.

    Returns:
        True if a run in the directory is to be resumed. Otherwise the directory holds only the configuration.

    Raises:
        ConfigError: the directory is not empty and neither `run.overwrite` nor `run.resume` allows its use; it does not
            hold a run; the run in it has another configuration, has more steps already, or is in use by another
            process; or it cannot be written.
    """
    try:
        return _prepare(config)
    except OSError as error:
        raise ConfigError(
            f"run.dir={config.run.dir}, checkpoint.dir={config.checkpoint_dir}: cannot be used ({error}); choose others"
        ) from error


def _prepare(config: Config) -> bool:
    path = config.run.dir
    if config.run.resume == "auto" and (path / _RESOLVED_CONFIG).is_file():
        with only_writer(config):
            check_same_run(load_config(path / _RESOLVED_CONFIG), config)
            check_steps(config)
            (path / _RESOLVED_CONFIG).write_text(dump_config(config))
        _logger.info("run.dir=%s: resuming the run in it", path)
        return (path / _LEDGER).is_file()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
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
        with only_writer(config):
            _check_checkpoint_dir(config)
            _logger.info("run.dir=%s: replacing the run in it", path)
            _empty(path)
    _check_checkpoint_dir(config)
    path.mkdir(parents=True, exist_ok=True)
    (path / _RESOLVED_CONFIG).write_text(dump_config(config))
    return False


def _empty(path: Path) -> None:
    """Delete the content of a directory but not the directory: it may be a mounted volume, or a link to one."""
    for child in path.iterdir():
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
    folder.mkdir(parents=True, exist_ok=True)
    if (step := checkpoint_store(config).newest_step()) is not None:
        raise ConfigError(
            f"checkpoint.dir={folder}: has a checkpoint of another run (step_{step}); choose another folder, "
            "or remove it"
        )


def check_same_run(before: Config, now: Config) -> None:
    """Raise ConfigError if a field differs that the ledger and the checkpoints depend on."""
    same = ["run.seed", "model", "data", "replay.group_size", "replay.groups_per_step", "checkpoint.dir"]
    # these are restored from the checkpoint, so that another value would have no effect
    same += [f"learner.{name}" for name in ("dtype", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2")]
    for name in same:
        if attrgetter(name)(before) != attrgetter(name)(now):
            raise ConfigError(
                f"{name}: differs from that of the run in {now.run.dir}, which run.resume=auto would continue; restore "
                "the earlier value, or choose another run.dir"
            )


def check_steps(config: Config) -> None:
    """Raise ConfigError if the run to resume has a checkpoint beyond `run.num_steps`."""
    done, wanted = checkpoint_store(config).newest_step(), config.run.num_steps
    if done is not None and done > wanted:
        raise ConfigError(
            f"run.num_steps={wanted}: the run in {config.run.dir} has a checkpoint of step {done}; set at least that, "
            "or choose another run.dir"
        )


@contextmanager
def only_writer(config: Config) -> Iterator[None]:
    """Hold an exclusive lock on `run.dir` and `checkpoint.dir`. Raises ConfigError if another process holds one."""
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
