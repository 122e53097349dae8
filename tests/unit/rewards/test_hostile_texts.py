"""Texts made to hang, fill or break the rewards that parse or execute them. (Programs: test_sandbox.py.)

Each ends in an outcome in time, none scores, memory comes back, and what follows is scored as before.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import reasoning_gym

from quatro_ray.config import VerifierConfig
from quatro_ray.failures import RewardUnavailable
from quatro_ray.rewards.reasoning_gym import EXECUTING_TASKS, METADATA_KEY
from quatro_ray.rewards.scorer import Scorer
from quatro_ray.types import Outcome, Query, Response
from tests.make import needs_sandbox
from tests.unit.hostile_programs import ATTACKS
from tests.unit.rewards.test_workers import reward_configs

pytestmark = pytest.mark.process

DEADLINE_S = 3.0
START_S = 120.0
"""Of a fresh process, on a machine that does other things; what takes longer hangs."""
MEMORY_MIB = 1024

BOXED = [
    "9^{9^{9^9}}", "9^{9^{9^{9^{9^{9}}}}}", "10000000!", "1000000000!", "((9!)!)!", "2^{2^{35}}-1",
    r"\binom{1000000000}{500000000}", r"\sum_{i=1}^{1000000000} i!", r"\prod_{i=1}^{10000000} i",
    r"\int_0^{10^9} e^{x^{x^x}} dx", r"\lim_{x \to 0} x^{x^{x^{x}}}", r"\frac{1}{0}", r"\infty - \infty",
    "(x+1)^{1000000}", "(x+y+z)^{500}", r"\sqrt[1000000000]{2}", r"\log(\log(\log(10^{10^{10^{10}}})))",
    "x" + "^{x" * 400 + "}" * 400, "{" * 450 + "1" + "}" * 450, "(" * 490 + "1" + ")" * 490,
    r"\frac{1}{" * 100 + "1" + "}" * 100, r"\sqrt{" * 150 + "2" + "}" * 150, "[" * 400 + "]" * 400, "-" * 999 + "1",
    "1+" * 400 + "1", "2*" * 400 + "2", "9" * 999, "0." + "9" * 990, "1e999999999", "1e-999999999", "-1e1000000000",
    r"\begin{pmatrix}" + "1&" * 300 + r"\end{pmatrix}", r"\{" + ",".join(map(str, range(250))) + r"\}",
    "x=" * 400, r"\boxed{" * 100 + "}" * 100, r"\text{" * 150 + "}" * 150, r"\left(" * 150, r"\begin" * 160, "\\" * 999,
    r"\def\a{\a}\a", r"\input{/etc/passwd}", "\x00" * 500, "\ud800\udfff\udc00", "\u202e46", "٤٦", "^" * 900, "_" * 900,
    "1/" * 450 + "1", "!" * 900, "7" + "!" * 12, r"\gcd(10^{100000}, 7)", "(10^{100000})!", "10^{10^{10}} \\bmod 7",
]  # fmt: skip
LONG = ["9" * 1_000_000, "{" * 20_000, "(" * 1_000_000, "\\boxed{" * 200_000, "\\boxed{1}" * 200_000, "a" * 10_000_000]
CATASTROPHIC = ["a" * n + "!" for n in (28, 40, 1_000, 100_000)]
EXECUTED = [
    "__import__('os').system('touch {mark}')", "open('{mark}', 'w')", "__import__('os').fork()",
    "[__import__('os').fork() for _ in range(99999)]", "__import__('subprocess').run(['touch', '{mark}'])",
    "__import__('socket').create_connection(('127.0.0.1', {port}))", "__import__('os').kill(-1, 9)",
    "__import__('os').kill(__import__('os').getppid(), 9)", "exec('import os; os._exit(0)')", "exit()",
    "__import__('shutil').rmtree('{folder}')", "'x' * 10**11", "().__class__.__base__.__subclasses__()",
]  # fmt: skip
LOOPING = ["9**9**9**9", "sum(1 for _ in iter(int, 1))", "[x for x in iter(int, 1)]"]


def resident_bytes() -> int:
    """Return the memory of all processes that this one started."""
    total = 0
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total


def score_all(
    rewards: Any,
    items: Sequence[tuple[Query, str]],
    sandboxed: frozenset[str] = frozenset(),
    deadline_s: float = DEADLINE_S,
) -> list[Any]:
    """Outcomes; a reward that raised counts as its exception."""
    config = VerifierConfig(num_workers=3, deadline_s=deadline_s, memory_mib=MEMORY_MIB)

    async def one(scorer: Scorer, slots: asyncio.Semaphore, query: Query, text: str) -> Any:
        async with slots:  # so that time is counted from where a worker is free
            scoring = scorer(query, Response(text, 10, truncated=False))
            try:
                return await asyncio.wait_for(scoring, 2 * (deadline_s + 1) + START_S)
            except RewardUnavailable as error:
                return error
            except TimeoutError as error:
                raise AssertionError(f"hangs: {text[:80]}") from error

    async def run() -> list[Any]:
        scorer = Scorer(rewards, config, {}, sandboxed)
        await scorer.start()
        try:
            slots = asyncio.Semaphore(config.num_workers)
            async with asyncio.TaskGroup() as group:
                scoring = [group.create_task(one(scorer, slots, *item)) for item in items]
            outcomes = [task.result() for task in scoring]
            # a worker that was just killed keeps its memory until the kernel has ended it
            give_up = time.monotonic() + START_S
            while resident_bytes() >= config.num_workers * MEMORY_MIB * 2**20 / 2:
                assert time.monotonic() < give_up
                await asyncio.sleep(0.2)
            return outcomes
        finally:
            await scorer.close()

    return asyncio.run(run())


def test_texts_for_math() -> None:
    query = Query("q", "p", r"\frac{46}{3}")
    hostile = [(query, rf"\boxed{{{text}}}") for text in BOXED] + [(query, text) for text in LONG]
    good = [(query, r"so it is \boxed{46/3}.")] * 5
    outcomes = score_all(reward_configs(answer={"kind": "math"}), hostile + good)
    for (_, text), score in zip(hostile, outcomes, strict=False):
        assert not isinstance(score, Exception), (text[:80], score)
        assert score.reward == 0.0, text[:80]
    assert [s.reward for s in outcomes[len(hostile) :]] == [1.0] * 5
    assert any(s.outcome is Outcome.EXHAUSTED for s in outcomes)


def test_texts_for_a_regular_expression_that_backtracks() -> None:
    query = Query("q", "p", "a")
    outcomes = score_all(
        reward_configs(shape={"kind": "regex", "pattern": "(a+)+$", "match": "full"}),
        [*((query, text) for text in CATASTROPHIC), (query, "aaa")],
    )
    assert [s.outcome for s in outcomes] == [Outcome.EXHAUSTED] * len(CATASTROPHIC) + [Outcome.OK]
    assert outcomes[-1].reward == 1


@needs_sandbox
def test_texts_for_scorers_that_execute_them(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "canary").write_text("canary")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        given = {"mark": str(tmp_path / "mark"), "folder": str(folder), "port": str(server.getsockname()[1])}
        texts = [text.format_map(given) for text in EXECUTED]
        items = [(gym(task), text) for task in sorted(EXECUTING_TASKS) for text in texts]
        items += [(gym("countdown"), text) for text in LOOPING]
        good = [(gym("countdown"), reasoning_gym.create_dataset("countdown", seed=3, size=2)[1]["answer"])] * 3
        rewards = reward_configs(answer={"kind": "reasoning_gym"})
        # a fresh worker makes the task's questions first, which takes a while on a busy machine
        outcomes = score_all(rewards, items + good, sandboxed=frozenset(["answer"]), deadline_s=8)
        with pytest.raises(TimeoutError):
            server.accept()
    for (query, text), score in zip(items, outcomes, strict=False):
        where = json.loads(query.metadata[METADATA_KEY])["task"], text[:80]
        # a scorer that raises is the scorer's failure, never a reward
        assert isinstance(score, RewardUnavailable) or score.reward == 0.0, (where, score)
    assert [s.reward for s in outcomes[-3:]] == [1.0] * 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder"]
    assert (folder / "canary").read_text() == "canary"


def gym(task: str) -> Query:
    where = {"task": task, "params": {}, "seed": 3, "size": 2, "index": 1}
    return Query(f"{task}:1", "p", "a", {METADATA_KEY: json.dumps(where)})


def test_there_are_enough_of_them() -> None:
    texts = len(BOXED) + len(LONG) + len(CATASTROPHIC) + len(LOOPING) + len(EXECUTED) * len(EXECUTING_TASKS)
    assert len(ATTACKS) + texts >= 200
