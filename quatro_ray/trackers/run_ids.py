"""The ids of a run in its trackers, by which a resumed run continues there."""

from __future__ import annotations

import json
from pathlib import Path

from quatro_ray.files import replace_file
from quatro_ray.telemetry.recorder import Recorder

IDS = "trackers.json"
"""The file in the run directory."""


class RunIds:
    """The ids by tracker, kept in a file. A file that cannot be read or written is reported and ends nothing."""

    def __init__(self, run_dir: Path, recorder: Recorder) -> None:
        self._path = run_dir / IDS
        self._recorder = recorder
        self._ids: dict[str, str] = {}
        try:
            if self._path.is_file():
                self._ids = dict(json.loads(self._path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            recorder.event("damaged", IDS, why=f"{error}; trackers begin new runs")

    def get(self, name: str) -> str | None:
        """Return the id of the run in a tracker; None if it has none yet."""
        return self._ids.get(name)

    def put(self, name: str, run_id: str) -> None:
        """Store an id."""
        if self._ids.get(name) == run_id:
            return
        self._ids[name] = run_id
        try:
            replace_file(self._path, json.dumps(self._ids, indent=2) + "\n")
        except OSError as error:
            self._recorder.event("failed", IDS, why=f"{error}; when the run is resumed, {name} may begin a new run")
