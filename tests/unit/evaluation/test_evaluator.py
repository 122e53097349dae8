"""An evaluation whose engines are lost is repeated once with new ones."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from quatro_ray.evaluation.engine_pool import PoolLost
from quatro_ray.evaluation.evaluator import Evaluator
from tests.make import config


class Losing(Evaluator):
    """Loses its engines `times` times."""

    times = 0

    @asynccontextmanager
    async def _sampler(self, model_path: Any, note: Callable[[str], None]) -> AsyncIterator[Any]:
        self.times -= 1
        if self.times >= 0:
            raise PoolLost("an evaluation engine was lost: its node is gone")
        yield None


def evaluate(times: int) -> list[str]:
    notes: list[str] = []
    evaluator = Losing(config(), None, lambda *_: None, {})  # type: ignore[arg-type]
    evaluator.times = times
    assert asyncio.run(evaluator.evaluate("model", 3, 3, {}, notes.append)) == []
    return notes


def test_engines_that_are_lost_once_are_replaced() -> None:
    (note,) = evaluate(1)
    assert "its node is gone" in note


def test_the_second_loss_ends_the_evaluation() -> None:
    with pytest.raises(PoolLost, match="its node is gone"):
        evaluate(2)
