"""The exceptions that a user can meet. Each message names what is wrong, the rule, and what to do."""


def last_line(error: BaseException) -> str:
    """What an exception says in the end; remote ones carry a whole traceback in their text."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


class QuatroError(Exception):
    """Base of all errors that the command line prints in one line, without a traceback."""


class ConfigError(QuatroError):
    """A configuration that breaks a rule; raised before any process starts."""


class DataError(QuatroError):
    """A data file that cannot be used; names the file and the line."""


class ClusterError(QuatroError):
    """The cluster cannot hold what the configuration asks for, or did not start in time."""


class StallError(QuatroError):
    """A wait ran past its deadline; the message says what everyone was doing."""


class WeightSyncError(QuatroError):
    """A phase of a weight update failed or missed its deadline."""


class CheckpointError(QuatroError):
    """A checkpoint that cannot be written, or is not what was written."""


class TrainingDiverged(QuatroError):
    """Numbers of the learner are not finite any more; starting it again would end the same way."""


class Preempted(QuatroError):
    """The run was told to end before it was done; with `run.resume: auto` the same command goes on."""


class LedgerError(QuatroError):
    """A transition that the life of a group does not allow."""


class DiskFull(LedgerError):
    """The ledger cannot be written for want of room; nothing of the transition was done."""


class SandboxError(QuatroError):
    """No sandbox that holds; the message says what is missing or leaks, and what to do."""
