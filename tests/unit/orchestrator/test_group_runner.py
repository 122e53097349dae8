"""A group that is dropped is counted once the ledger has it, and never otherwise."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from quatro_ray.orchestrator.group_runner import GroupRunner
from quatro_ray.telemetry.counters import Counters
from quatro_ray.types import DropReason
from tests.make import config


def test_a_drop_that_was_cancelled_is_not_counted(tmp_path: Path) -> None:
    """The group stays pending when the learner falls back at that moment, and may be trained in the end."""

    class Replay:
        is_cancelled = True

        async def drop(self, group_id: int, reason: DropReason) -> None:
            if self.is_cancelled:
                raise asyncio.CancelledError

    nothing: Any = None
    replay: Any = Replay()
    counters = Counters()
    runner = GroupRunner(config(tmp_path), nothing, nothing, replay, nothing, counters)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(runner._drop(7, DropReason.VERIFIER_TIMEOUT, None, None))
    assert counters.recent.read() == {}
    replay.is_cancelled = False
    asyncio.run(runner._drop(7, DropReason.VERIFIER_TIMEOUT, None, None))
    assert counters.recent.read() == {"drops/verifier_timeout": 1}
