"""The file now.json: what each part of a run does now. The timeline has a stay in a state only after its end."""

from __future__ import annotations

import errno
import json
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from quatro_ray.telemetry.activity import Activity

_FILE = "now.json"
_EVERY_S, _FRESH_S = 2.0, 10.0
_END_S = 10.0
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class NowFile:
    """Replaces now.json in the directory of a run every two seconds, in a thread, until it is closed.

    A run that is killed leaves the last version. While the disk is full, the file stays as it is.

    Args:
        run_dir: directory of the run.
        roles: the activity of each role; roles may be added meanwhile.
        warn: called with a message if the file cannot be written for another reason; then it is given up.
        every_s: seconds between two versions.
    """

    def __init__(
        self, run_dir: Path, roles: Mapping[str, Activity], warn: Callable[[str], None], every_s: float = _EVERY_S
    ) -> None:
        self._path = run_dir / _FILE
        self._writing = run_dir / f"{_FILE}.writing"
        self._roles = roles
        self._warn = warn
        self._every_s = every_s
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._loop, name=_FILE, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread, and remove the file: the run has ended in order."""
        self._is_closed.set()
        self._thread.join(_END_S)
        if self._thread.is_alive():
            return self._warn(f"{_FILE} stays: its disk has not answered for {_END_S:g} s")
        for path in (self._path, self._writing):
            path.unlink(missing_ok=True)

    def _loop(self) -> None:
        try:
            while True:
                self._write()
                if self._is_closed.wait(self._every_s):
                    return
        except OSError as error:
            self._warn(f"{_FILE} cannot be written any more ({error}); `quatro-ray status` shows no states")

    def _write(self) -> None:
        now = time.time()
        roles = {
            role: [[member, state, now - seconds] for member, (state, seconds) in activity.now().items()]
            for role, activity in dict(self._roles).items()
        }
        try:
            self._writing.write_text(json.dumps({"clock_s": now, "host": socket.gethostname(), "roles": roles}))
            os.replace(self._writing, self._path)  # without a sync: after a crash of the machine nothing needs it
        except OSError as error:
            if error.errno not in _NO_SPACE:
                raise


@dataclass(frozen=True)
class Now:
    """The content of now.json.

    Attributes:
        clock_s: when it was written, in seconds since the epoch.
        host: name of the machine on which the controller runs.
        roles: state of each member of each role, and since when it is in it, in seconds since the epoch.
    """

    clock_s: float
    host: str
    roles: Mapping[str, Mapping[int, tuple[str, float]]]

    def is_alive_elsewhere(self) -> bool:
        """Return whether a controller on another machine writes the file now."""
        return self.host != socket.gethostname() and time.time() - self.clock_s < _FRESH_S


def read_now(run_dir: Path) -> Now | None:
    """Return the content of now.json; None if there is none that can be read."""
    try:
        found = json.loads((run_dir / _FILE).read_text())
        roles = {role: {int(i): (str(s), float(t)) for i, s, t in members} for role, members in found["roles"].items()}
        now = Now(float(found["clock_s"]), str(found["host"]), roles)
    except (FileNotFoundError, ValueError, OverflowError, KeyError, TypeError, AttributeError):
        return None
    times = [now.clock_s, *(since for members in roles.values() for _, since in members.values())]
    return now if all(map(math.isfinite, times)) and all(map(str.strip, roles)) else None
