"""One training run, observed from outside, over all driver processes that it takes."""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.faults import hostile_reward
from benchmarks.faults.disk import Disk
from benchmarks.faults.hostile_reward import TRIGGER
from benchmarks.faults.processes import MARKER, Family, Role, describe
from benchmarks.faults.records import Lines, Steps
from quatro_ray.replay.ledger_reader import LedgerRows, read_rows

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1
_HOSTILE = Path(hostile_reward.__file__)
_ORPHAN_S = 30.0
_MEMORY_EVERY_S = 5.0


class Run:
    """One training run.

    Args:
        config: path of the YAML file.
        overrides: `section.field=value` …
        folder: for the run's directory and the drivers' output.
        temp: where Ray keeps its sessions; the path must be short because sockets are in it.
        disk: where the checkpoints are, if not in the run's directory.
        home: where the run's directory is, if not in `folder`; `close` moves it there.
    """

    def __init__(
        self,
        config: Path,
        overrides: Sequence[str],
        folder: Path,
        temp: Path,
        disk: Disk | None,
        home: Disk | None = None,
    ) -> None:
        self.folder = folder
        self.home = home
        self.dir = home.path / folder.name if home else folder / "run"
        self.trigger = folder / "trigger"
        """Makes the reward of hostile_reward.py misbehave."""
        self.disk = disk
        self.checkpoints = disk.path / folder.name if disk else self.dir / "checkpoints"
        folder.mkdir(parents=True)
        given = [f"run.dir={self.dir}", "run.resume=auto", "run.overwrite=false", f"checkpoint.dir={self.checkpoints}"]
        given += [f"rewards.hostile={{kind: python, function: '{_HOSTILE}:score', weight: 0}}"]
        given += [f"verifier.pass_env=[{TRIGGER}]"]
        self._command = [str(Path(sys.executable).parent / "quatro-ray"), "train", str(config), *given, *overrides]
        self.family = Family(marker := secrets.token_hex(8))
        kept = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        self._environment = kept | {MARKER: marker, TRIGGER: str(self.trigger.absolute()), "RAY_TMPDIR": str(temp)}
        self._looked_at_memory = 0.0
        self._lines = Lines(self.dir / "events.jsonl")
        self.driver: subprocess.Popen[bytes] | None = None
        self.num_starts = 0
        self.steps = Steps(self.dir)
        self.events: list[dict[str, Any]] = []
        self.down: set[str] = set()
        """Components that were lost and have not recovered."""
        self.snapshots: list[LedgerRows] = []
        self._start_mark = 0.0

    def start(self) -> None:
        """Start the driver, always with the same command; run.resume=auto continues the run."""
        self.num_starts += 1
        self.look()  # the last driver's last words
        self.down.clear()
        self._start_mark = self.steps.newest_s
        with self._log().open("wb") as log:
            self.driver = subprocess.Popen(
                self._command, env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True, preexec_fn=_as_in_a_terminal,
            )  # fmt: skip
        self.family.add(self.driver.pid)

    def _log(self) -> Path:
        return self.folder / f"driver_{self.num_starts}.log"

    def look(self) -> list[dict[str, Any]]:
        """Takes note of what happened since the last look; returns the new events."""
        self.family.look()
        if time.monotonic() - self._looked_at_memory > _MEMORY_EVERY_S:
            self._looked_at_memory = time.monotonic()
            self.family.look_at_memory()
        new = self._lines.new()
        for event in new:
            if event["event"] == "lost":
                self.down.add(event["part"])
            elif event["event"] in ("recovered", "given_up"):
                self.down.discard(event["part"])
        self.events += new
        self.steps.look()
        return new

    def status(self) -> int | None:
        """Return the driver's exit status; None while it runs."""
        assert self.driver is not None
        return self.driver.poll()

    def is_done(self) -> bool:
        return self.status() == 0 and (self.dir / "summary.json").is_file()

    def is_steady(self) -> bool:
        """Return whether no component is lost and this driver has made a step."""
        return self.status() is None and not self.down and self.steps.newest_s > self._start_mark

    def process(self, role: Role) -> list[psutil.Process]:
        """Return the processes of a role; the driver is only our own child."""
        if role is Role.DRIVER:
            assert self.driver is not None
            return [psutil.Process(self.driver.pid)] if self.status() is None else []
        return self.family.of(role)

    def snapshot(self) -> LedgerRows:
        ledger = read_rows(self.dir / "ledger.sqlite")
        self.snapshots.append(ledger)
        return ledger

    def newest_checkpoints(self) -> list[Path]:
        """Return complete checkpoints, newest first; none while one is being written."""
        if not self.checkpoints.is_dir() or any(self.checkpoints.glob("step_*.writing")):
            return []
        found = [p for p in self.checkpoints.glob("step_*") if p.name.removeprefix("step_").isdigit()]
        return sorted(found, key=lambda p: int(p.name.removeprefix("step_")), reverse=True)

    def clean_up(self) -> list[str]:
        """Kill and return the orphans: processes that outlive the driver by 30 s."""
        orphans = describe(self.family.wait_gone(_ORPHAN_S))
        self.family.kill()
        return orphans

    def last_words(self) -> str:
        """Return the last line that the driver printed."""
        lines = self._log().read_text(errors="replace").splitlines()
        return lines[-1][:500] if lines else ""

    def close(self) -> None:
        """Kill all processes of the run."""
        self.family.kill()
        if self.driver is not None:
            self.driver.wait(timeout=30)

    def keep(self) -> None:
        """Move the run's directory from the disk of its own to the folder."""
        if self.home is not None:
            shutil.move(self.dir, self.folder / "run")
            self.dir = self.folder / "run"


def _as_in_a_terminal() -> None:
    """Die with the parent, and have no signal ignored: a shell's background jobs ignore SIGINT, and nohup SIGHUP."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
