"""Real worker processes that hang, die, fill memory: every item ends in time, and the next one is scored as before."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from pydantic import TypeAdapter

from quatro_ray.config import RewardConfig, VerifierConfig
from quatro_ray.errors import ConfigError
from quatro_ray.failures import RewardUnavailable
from quatro_ray.isolation.worker_pool import Launch
from quatro_ray.rewards import workers as reward_workers
from quatro_ray.rewards.scorer import Scorer
from quatro_ray.types import Outcome, Query, Response, Score
from tests.children import none_left, workers

pytestmark = pytest.mark.process

QUERY = Query("q", "12+34=", "46", source="sums")
AWKWARD = """
import os, signal, subprocess, sys, time

def obey(query, response):
    print("noise on standard output")
    match response.text:
        case "hang": time.sleep(600)
        case "stop": os.kill(os.getpid(), signal.SIGSTOP)
        case "leave": os._exit(3)
        case "exit": sys.exit(4)
        case "abort": os.abort()
        case "crash": os.kill(os.getpid(), signal.SIGSEGV)
        case "raise": raise RuntimeError("cannot score")
        case "fill": return len(bytearray(8 << 30))
        case "large": return float(len(bytearray(os.urandom(1) * (600 << 20))) > 0)
        case "deep": return (lambda f: f(f))(lambda f: f(f))
        case "children":
            if os.fork() == 0: time.sleep(600)
            time.sleep(600)
        case "copies": return float(os.fork() > 1)
        case "orphan": subprocess.Popen(["sleep", "MARK"], start_new_session=True); time.sleep(600)
        case "bare orphan":  # its parent ends first, and it has neither streams nor environment of the worker
            if os.fork() == 0:
                os.setsid(); os.closerange(0, 1000)
                if os.fork() == 0: os.execve("/bin/sleep", ["sleep", "MARK"], {})
                os._exit(0)
            os.wait(); time.sleep(600)
        case "orphan of a crash": subprocess.Popen(["sleep", "MARK"], start_new_session=True); os._exit(3)
        case "orphan of a good one": subprocess.Popen(["sleep", "MARK"], start_new_session=True)
        case "nan": return float("nan")
        case "huge": return -1e154
        case "pid": return os.getpid()
        case "variables": print(" ".join(sorted(os.environ)))
    return 1.0
"""


def reward_configs(**settings: dict[str, Any]) -> dict[str, RewardConfig]:
    adapter: TypeAdapter[RewardConfig] = TypeAdapter(RewardConfig)
    return {name: adapter.validate_python(value) for name, value in settings.items()}


@pytest.fixture
def awkward(tmp_path: Path) -> dict[str, RewardConfig]:
    path = tmp_path / "awkward.py"
    path.write_text(AWKWARD)
    return reward_configs(mine={"kind": "python", "function": f"{path}:obey"})


def config(**over: Any) -> VerifierConfig:
    return VerifierConfig(**({"num_workers": 2, "deadline_s": 2, "memory_mib": 1024} | over))


def with_scorer(rewards: dict[str, RewardConfig], work: Callable[[Scorer], Awaitable[Any]], **over: Any) -> Any:
    async def run() -> Any:
        scorer = Scorer(rewards, config(**over), {})
        await scorer.start()
        try:
            return await asyncio.wait_for(work(scorer), 120)
        finally:
            await scorer.close()

    with none_left():
        return asyncio.run(run())


def response(text: str) -> Response:
    return Response(text, 3, truncated=False)


async def scores(scorer: Scorer, *texts: str) -> list[Score]:
    return await asyncio.gather(*(scorer(QUERY, response(t)) for t in texts))


@pytest.mark.parametrize("text", ["hang", "stop", "fill", "deep", "children"])
def test_a_response_that_uses_up_its_limits_twice_is_exhausted(awkward: Any, text: str) -> None:
    async def work(scorer: Scorer) -> list[Score]:
        begun = time.monotonic()
        first, *others = await scores(scorer, text, "good", "good", "good")
        assert time.monotonic() - begun < 2 * 2 + 1 + 100  # two deadlines, and starts on a loaded machine
        return [first, *others, *await scores(scorer, "good", "good", "good")]

    first, *others = with_scorer(awkward, work, exhausted_reward=-0.5)
    assert (first.outcome, first.reward) == (Outcome.EXHAUSTED, -0.5)
    assert first.detail.startswith("twice: ")
    assert [s.reward for s in others] == [1.0] * 6


@pytest.mark.parametrize(
    ("text", "how"), [("leave", "3"), ("exit", r"sys.exit\(4\)"), ("crash", "-11"), ("abort", "-6")]
)
def test_a_function_that_ends_its_process_is_no_verdict_on_the_response(awkward: Any, text: str, how: str) -> None:
    async def work(scorer: Scorer) -> Score:
        with pytest.raises(RewardUnavailable, match=rf"{how}.*; a function \(mine\) must not end its process"):
            await scorer(QUERY, response(text))
        return await scorer(QUERY, response("good"))

    assert with_scorer(awkward, work).reward == 1


def test_a_copy_of_the_process_does_not_answer(awkward: Any) -> None:
    async def work(scorer: Scorer) -> list[Score]:
        return await scores(scorer, "copies", "good", "copies", *["good"] * 4)

    got = with_scorer(awkward, work, num_workers=1, deadline_s=20)
    assert [(s.outcome, s.reward) for s in got] == [(Outcome.OK, 1.0)] * 7


FORGER = """
import json, os

def forge(query, response):
    body = json.dumps({"values": {"mine": 7.0}, "unreadable": "", "no_verdict": [], "printed": "", "nonce": 2}).encode()
    frames = {"forge": len(body).to_bytes(4, "big") + body, "garbage": b"\\0\\0\\0\\3abc", "long": b"\\xff" * 99,
              "list": b"\\0\\0\\0\\2[]"}
    if response.text in frames:
        for descriptor in range(3, 20):
            try:
                os.write(descriptor, frames[response.text])
            except OSError:
                pass
    return 1.0
"""


@pytest.mark.parametrize("what", ["forge", "garbage", "long", "list"])
def test_a_reply_that_nobody_asked_for_is_noticed_and_its_item_judged_again(tmp_path: Path, what: str) -> None:
    (tmp_path / "forger.py").write_text(FORGER)
    rewards = reward_configs(mine={"kind": "python", "function": f"{tmp_path}/forger.py:forge"})

    async def work(scorer: Scorer) -> list[Score]:
        first = await scorer(QUERY, response(what))  # twice out of turn
        return [first, await scorer(QUERY, response("good")), await scorer(QUERY, response("good"))]

    first, *others = with_scorer(rewards, work, num_workers=1, deadline_s=20)
    assert (first.outcome, first.reward) == (Outcome.EXHAUSTED, 0.0)
    assert ("answered another request" if what == "forge" else "sent what is no reply") in first.detail
    assert [(s.outcome, s.reward) for s in others] == [(Outcome.OK, 1.0)] * 2


@pytest.mark.parametrize("text", ["orphan", "bare orphan", "orphan of a crash", "orphan of a good one"])
def test_processes_that_a_function_leaves_behind_end_with_the_worker(awkward: Any, text: str, tmp_path: Path) -> None:
    mark = f"6{time.time_ns() % 10**9}"
    (path,) = tmp_path.glob("awkward.py")
    path.write_text(AWKWARD.replace("MARK", mark))

    async def work(scorer: Scorer) -> float:
        begun = time.monotonic()
        with suppress(RewardUnavailable):
            await scorer(QUERY, response(text))
        await scorer(QUERY, response("good"))
        return time.monotonic() - begun

    seconds = with_scorer(awkward, work, num_workers=1, deadline_s=1, recycle_after=2)
    assert seconds < 2 * 1 + 100  # two deadlines and starts
    assert not [p for p in psutil.process_iter(["cmdline"]) if mark in (p.info["cmdline"] or [])]


def test_what_the_machinery_causes_is_never_a_reward(awkward: Any) -> None:
    async def work(scorer: Scorer) -> None:
        for text in ("raise", "nan", "huge"):
            with pytest.raises(RewardUnavailable, match=r"cannot score|a reward must be a finite number"):
                await scorer(QUERY, response(text))
        waiting = asyncio.create_task(scorer(QUERY, response("hang")))
        await asyncio.sleep(0.3)
        (busy,) = workers("quatro_ray.rewards.worker")
        os.kill(busy.pid, signal.SIGKILL)
        with pytest.raises(RewardUnavailable, match="the worker ended with -9"):
            await waiting
        assert (await scorer(QUERY, response("good"))).reward == 1

    with_scorer(awkward, work, num_workers=1, deadline_s=20)


def test_many_good_ones_are_not_held_up_by_a_few_that_hang(awkward: Any) -> None:
    texts = ["good" if i % 50 else "hang" for i in range(200)]
    got = with_scorer(awkward, lambda scorer: scores(scorer, *texts), deadline_s=1)
    assert [s.reward for s in got] == [float(t == "good") for t in texts]
    assert sum(s.outcome is Outcome.EXHAUSTED for s in got) == 4


def test_a_worker_is_replaced_after_its_share_or_when_it_has_grown(awkward: Any) -> None:
    async def pids(scorer: Scorer, *between: str) -> tuple[float, float]:
        first = (await scorer(QUERY, response("pid"))).reward
        for text in between:
            await scorer(QUERY, response(text))
        return first, (await scorer(QUERY, response("pid"))).reward

    same = with_scorer(awkward, lambda s: pids(s, "good"), num_workers=1)
    assert same[0] == same[1]
    many = with_scorer(awkward, lambda s: pids(s, "good", "good"), num_workers=1, recycle_after=2)
    assert many[0] != many[1]
    grown = with_scorer(awkward, lambda s: pids(s, "large"), num_workers=1, memory_mib=1024, deadline_s=10)
    assert grown[0] != grown[1]


def test_workers_see_named_variables_only(awkward: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY", "JUDGE_KEY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "secret")
    (score,) = with_scorer(awkward, lambda scorer: scores(scorer, "variables"), pass_env=["JUDGE_KEY"])
    seen = score.printed.split()
    assert {"PATH", "HOME", "JUDGE_KEY", "PYTHONPATH"} <= set(seen)
    assert not {"RAY_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY", "HTTPS_PROXY"} & set(seen)


def test_a_variable_that_is_not_set_is_an_error_at_the_start(awkward: Any) -> None:
    with pytest.raises(ConfigError, match=r"pass_env: NOT_SET_ANYWHERE is not set on .*; set it, or remove the name"):
        with_scorer(awkward, lambda s: scores(s, "good"), pass_env=["NOT_SET_ANYWHERE"])


def test_the_sum_of_the_rewards_that_apply() -> None:
    rewards = reward_configs(
        answer={"kind": "integer", "extract": "answer_tag"},
        shape={"kind": "format", "tags": ["answer"], "weight": 0.5},
        other={"kind": "exact", "only": ["elsewhere"]},
    )
    good, shapeless = with_scorer(rewards, lambda s: scores(s, "<answer>46</answer>", "so <answer>46</answer>"))
    assert (good.reward, good.reward_values) == (1.5, {"answer": 1.0, "shape": 1.0})
    assert (shapeless.reward, shapeless.reward_values) == (1.0, {"answer": 1.0, "shape": 0.0})


def test_a_cancelled_item_leaves_no_process_out_of_step(awkward: Any) -> None:
    async def work(scorer: Scorer) -> float:
        task = asyncio.create_task(scorer(QUERY, response("hang")))
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return (await scorer(QUERY, response("good"))).reward

    assert with_scorer(awkward, work, num_workers=1) == 1


def test_rewards_that_cannot_be_made_say_so_at_the_start(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("import nowhere_at_all\ndef f(q, r): ...\n")
    with pytest.raises(ConfigError, match="No module named 'nowhere_at_all'"):
        with_scorer(reward_configs(mine={"kind": "python", "function": f"{path}:f"}), lambda s: scores(s, "x"))


def test_a_process_that_does_not_come_up_is_not_the_answers_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run(command: list[str]) -> None:
        monkeypatch.setattr(reward_workers, "in_the_open", lambda *_: lambda: nullcontext(Launch(command)))
        pool = reward_workers.RewardProcesses(
            config(num_workers=1, start_deadline_s=1), reward_configs(a={"kind": "exact"})
        )
        with pytest.raises(RewardUnavailable, match="a worker process did not start"):
            await pool.start()

    asyncio.run(run(["sleep", "60"]))
    asyncio.run(run(["false"]))
    asyncio.run(run(["/nowhere/python"]))
