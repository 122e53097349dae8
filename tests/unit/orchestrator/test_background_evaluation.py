"""Evaluation in the background: in order, one at a time, never twice, and none of what was abandoned."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from quatro_ray.orchestrator.background_evaluation import BackgroundEvaluation
from quatro_ray.telemetry.console import Progress
from quatro_ray.telemetry.counters import Counters
from quatro_ray.telemetry.evaluation_result import EvaluationResult
from quatro_ray.telemetry.recorder import Recorder


def result(version: int, step: int) -> EvaluationResult:
    return EvaluationResult("sums", version, step, 4, 8, {1: 0.5}, 0.5, {}, 3, 0.5, 0.0, 99)


class Evaluator:
    """Evaluates when it is let."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.may_end = asyncio.Event()

    async def evaluate(
        self, model_path: Path | str, version: int, step: int, held_out: Any, note: Callable[[str], None]
    ) -> list[EvaluationResult]:
        assert Path(model_path).is_dir()
        self.begun.append(version)
        await self.may_end.wait()
        return [result(version, step)]


@pytest.fixture
def recorder(tmp_path: Path) -> Iterator[Recorder]:
    made = Recorder(tmp_path, num_steps=9, progress=Progress())
    yield made
    made.close()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def with_loop(
    folder: Path, recorder: Recorder, work: Callable[[BackgroundEvaluation, Evaluator], Awaitable[None]]
) -> Counters:
    """The tally after `work`, while the loop of evaluations runs beside it."""
    tally = Counters()

    async def run() -> None:
        evaluator = Evaluator()
        evaluations = BackgroundEvaluation(evaluator, {}, folder / "evaluating", recorder, tally)
        loop = asyncio.create_task(evaluations.loop())
        working = asyncio.create_task(asyncio.wait_for(work(evaluations, evaluator), 60))
        await asyncio.wait({loop, working}, return_when=asyncio.FIRST_COMPLETED)
        loop.cancel()
        await working

    asyncio.run(run())
    return tally


def export(evaluations: BackgroundEvaluation, version: int, step: int) -> None:
    evaluations.path(version).mkdir(parents=True)
    evaluations.exported(version, step)


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_one_after_the_other_and_at_most_two_pending(tmp_path: Path, recorder: Recorder) -> None:
    async def work(evaluations: BackgroundEvaluation, evaluator: Evaluator) -> None:
        export(evaluations, 3, 2)
        await evaluations.wait_for_capacity()
        export(evaluations, 5, 4)
        full = asyncio.create_task(evaluations.wait_for_capacity())
        await settle()
        assert evaluator.begun == [3] and not full.done()
        assert evaluations.pending() == [(3, 2), (5, 4)] and evaluations.newest_step == 4
        evaluator.may_end.set()
        await full
        await evaluations.finish()
        assert evaluator.begun == [3, 5] and evaluations.pending() == []
        assert not evaluations.path(3).exists() and not evaluations.path(5).exists()

    tally = with_loop(tmp_path, recorder, work)
    assert [(e.version, e.step) for e in tally.evaluations] == [(3, 2), (5, 4)]
    assert [e["step"] for e in lines(tmp_path / "evaluations.jsonl")] == [2, 4]


def test_what_is_abandoned_is_neither_begun_nor_counted(tmp_path: Path, recorder: Recorder) -> None:
    async def work(evaluations: BackgroundEvaluation, evaluator: Evaluator) -> None:
        export(evaluations, 3, 2)
        export(evaluations, 5, 4)
        await settle()
        assert evaluator.begun == [3]
        evaluations.fell_back(6, 1)  # both are of steps after 1: one is under way, the other waits
        assert evaluations.newest_step == 1
        export(evaluations, 7, 2)  # step 2 once more, under a version of the new line
        evaluator.may_end.set()
        await evaluations.finish()
        assert evaluator.begun == [3, 7]

    tally = with_loop(tmp_path, recorder, work)
    assert [(e.version, e.step) for e in tally.evaluations] == [(7, 2)]
    assert [e["version"] for e in lines(tmp_path / "evaluations.jsonl")] == [7]


def test_a_fall_takes_back_what_was_evaluated_of_later_steps(tmp_path: Path, recorder: Recorder) -> None:
    tally = Counters()
    evaluations = BackgroundEvaluation(None, {}, tmp_path / "evaluating", recorder, tally)
    evaluations.add([result(0, 0), result(2, 2), result(4, 4)])
    assert evaluations.newest_step == 4
    evaluations.fell_back(5, 2)
    assert [e.step for e in tally.evaluations] == [0, 2] and evaluations.newest_step == 2
    evaluations.add([result(4, 4)])  # it arrives late
    assert [e.step for e in tally.evaluations] == [0, 2]
    evaluations.add([result(7, 4)])
    assert [e.version for e in tally.evaluations] == [0, 2, 7] and evaluations.newest_step == 4


def test_a_resumed_run_takes_up_results_and_exports_and_removes_the_rest(tmp_path: Path, recorder: Recorder) -> None:
    folder, tally = tmp_path / "evaluating", Counters()
    for version in (2, 4, 6):
        (folder / f"version_{version}").mkdir(parents=True)
    (folder / "version_2.json").write_text(json.dumps([result(2, 2).to_dict()]))
    evaluations = BackgroundEvaluation(Evaluator(), {}, folder, recorder, tally)
    evaluations.resume([[2, 2], [4, 4], [5, 5]])  # done after the checkpoint; exported; lost
    assert [(e.version, e.step, e.pass_at) for e in tally.evaluations] == [(2, 2, {1: 0.5})]
    assert evaluations.pending() == [(4, 4)] and evaluations.newest_step == 4
    assert [p.name for p in folder.iterdir() if p.is_dir()] == ["version_4"]
    (event,) = lines(tmp_path / "events.jsonl")
    assert (event["event"], event["part"], event["step"], event["version"]) == ("failed", "evaluation", 5, 5)
    assert event["why"] == "left out: nothing is left of its export"


def test_without_engines_for_evaluation_what_was_pending_is_left_out(tmp_path: Path, recorder: Recorder) -> None:
    folder, tally = tmp_path / "evaluating", Counters()
    (folder / "version_4").mkdir(parents=True)
    evaluations = BackgroundEvaluation(None, {}, folder, recorder, tally)
    evaluations.resume([[4, 4]])
    assert evaluations.pending() == [] and not list(folder.iterdir())
    (event,) = lines(tmp_path / "events.jsonl")
    assert event["why"] == "left out: evaluation.num_engines is 0 now"
