"""The exceptions that a user can see. Each message names what is wrong, the rule, and what to do."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


def last_line(error: BaseException) -> str:
    """Return the last line of an exception's text; that of a remote exception holds a whole traceback."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


class QuatroError(Exception):
    """Base class of all errors that the command line prints without a traceback."""


class ConfigError(QuatroError):
    """A configuration that breaks a rule; raised before any process starts."""


class DataError(QuatroError):
    """A data file that cannot be used; names the file and the line."""


class SeveralErrors(ConfigError):
    """Several errors that were found before any process started; the message has a line for each.

    Attributes:
        errors: each by itself.
    """

    def __init__(self, errors: Sequence[QuatroError]) -> None:
        super().__init__("\n  ".join([f"{len(errors)} problems", *map(str, errors)]))
        self.errors = tuple(errors)

    def __reduce__(self) -> tuple[type[SeveralErrors], tuple[tuple[QuatroError, ...]]]:
        """Pickle the errors, of which the message is made."""
        return SeveralErrors, (self.errors,)


class ClusterError(QuatroError):
    """The cluster cannot hold what the configuration asks for, or did not start in time."""


class StallError(QuatroError):
    """A wait ran past its deadline; the message says what every component was doing."""


class WeightSyncError(QuatroError):
    """A phase of a weight update failed or missed its deadline."""


class CheckpointError(QuatroError):
    """A checkpoint that cannot be written, or whose content differs from what was written."""


class TrainingDiverged(QuatroError):
    """Loss or gradient stays non-finite; a restart from the checkpoint would end the same way."""


class ObjectiveError(QuatroError):
    """The user's own loss or advantage failed, or returned what no step can be computed from."""


class Preempted(QuatroError):
    """A signal ended the run before its last step; with `run.resume: auto` the same command continues it.

    Attributes:
        number: of the signal.
    """

    number: int = signal.SIGTERM


class TakenOver(QuatroError):
    """A newer attempt writes into the run directory, so that this one has stopped."""


class LedgerError(QuatroError):
    """A state transition that the life cycle of a group does not allow."""


class DiskFull(LedgerError):
    """The disk is too full to write the ledger; the transition was rolled back."""


class LedgerUnreadable(LedgerError):
    """The file of the ledger cannot be read, which does not mean that it is damaged."""


class LedgerLocked(LedgerUnreadable):
    """Another program has locked the ledger for a minute; the transition was not begun."""


class SandboxError(QuatroError):
    """The sandbox does not isolate programs; the message says what is missing or leaks, and what to do."""


class Problems:
    """Collects the errors of several checks, so that a user sees all of them at once."""

    def __init__(self) -> None:
        self._found: list[QuatroError] = []

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Run one check; an error that the user can cause is kept for `refuse`."""
        try:
            yield
        except SeveralErrors as several:
            self._add(several.errors)
        except (ConfigError, DataError, SandboxError) as error:
            self._add([error])

    def _add(self, errors: Sequence[QuatroError]) -> None:
        known = set(map(str, self._found))
        self._found += [error for error in errors if str(error) not in known]

    def refuse(self) -> None:
        """Raise the only problem as it is, or SeveralErrors; do nothing if there is none."""
        if len(self._found) == 1:
            raise self._found[0]
        if self._found:
            raise SeveralErrors(self._found)
