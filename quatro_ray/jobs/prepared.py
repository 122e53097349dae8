"""The checks of a training run in a process of its own, which takes torch and transformers with it when it ends."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from threading import Timer

from quatro_ray.config import Config
from quatro_ray.data.dataset import Dataset
from quatro_ray.errors import ClusterError, QuatroError

_PROGRAM = "quatro_ray.jobs.preflight_process"
_DEADLINE_S = 3600.0
"""So long that a million rows are read and encoded."""


@dataclass(frozen=True)
class Prepared:
    """The data and the findings of the checks.

    Attributes:
        dataset: all queries, without those whose prompts are too long.
        inputs: fingerprints of data and model, by which a resumed run notices changes.
        notes: findings that a user should see but that do not end the run, one line each.
    """

    dataset: Dataset
    inputs: dict[str, str]
    notes: tuple[str, ...]


def prepare(config: Config) -> Prepared:
    """Return the result of `preflight.check`, called in another process with the same output.

    Raises:
        SeveralErrors: several checks failed.
        QuatroError: one check failed, or the process was ended or took longer than an hour.
    """
    read, write = os.pipe()
    # -P: files in the current directory must not hide libraries
    command = [sys.executable, "-P", "-m", _PROGRAM, str(write)]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=(write,)) as process,
        os.fdopen(read, "rb") as answer,
    ):
        os.close(write)
        deadline = Timer(_DEADLINE_S, process.kill)
        deadline.start()
        try:
            assert process.stdin is not None
            with suppress(BrokenPipeError), process.stdin as request:  # a process that has ended leaves no result
                request.write(pickle.dumps(config))
            result = answer.read()
        except BaseException:
            process.kill()
            raise
        finally:
            deadline.cancel()
    if not result:
        raise ClusterError(
            f"the checks before the start ended with status {process.returncode} and without a result (-9: killed, for "
            f"lack of memory or after {_DEADLINE_S:g} s); their output is above"
        )
    found: Prepared | QuatroError = pickle.loads(result)
    if isinstance(found, QuatroError):
        raise found
    return found
