"""The program of a tracker's process, `python -m quatro_ray.trackers.worker`.

The first frame has the tracker's name; each request calls one of its methods (isolation/protocol.py).
"""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

from quatro_ray.errors import ConfigError
from quatro_ray.isolation.protocol import Handler, Message, Pipes, serve
from quatro_ray.isolation.user_function import failure_line
from quatro_ray.telemetry.tracker import TrackedRun
from quatro_ray.trackers.registry import make_tracker

_MAX_PRINTED_CHARS = 1000
"""Characters of what a tracker prints in one call that are kept."""


def _make_handler(hello: Message) -> Handler:
    try:
        tracker = make_tracker(hello["tracker"])
    except ConfigError:
        raise
    except Exception as error:  # the user's class may raise anything
        raise ConfigError(f"making it {failure_line(error)}") from error

    def call(_: Pipes, request: Message) -> Message:
        arguments = request["arguments"]
        if request["hook"] == "on_start":
            run = TrackedRun(**arguments[0])
            arguments = [replace(run, dir=Path(run.dir))]
        printed = io.StringIO()
        with redirect_stdout(printed), redirect_stderr(printed):
            answer = _answer(tracker, request["hook"], arguments)
        return answer | {"printed": printed.getvalue()[:_MAX_PRINTED_CHARS].strip()}

    return call


def _answer(tracker: Any, hook: str, arguments: list[Any]) -> Message:
    method = getattr(tracker, hook, None)
    if method is None:
        return {}
    try:
        result = method(*arguments)
    except (MemoryError, RecursionError):  # reported by isolation/protocol.py
        raise
    except Exception as error:  # a client or the user's code may raise anything
        return {"error": f"{hook} {failure_line(error)}"}
    if hook != "on_start":
        return {}
    return {"id": None if result is None else str(result), "place": str(getattr(tracker, "place", ""))}


if __name__ == "__main__":
    serve(_make_handler)
