"""The HTTP reward: batches, their one fate, and the example server."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import quatro_ray
from quatro_ray.config import HttpRewardConfig
from quatro_ray.failures import RewardUnavailable
from quatro_ray.rewards import http_client
from quatro_ray.rewards.http import HttpReward
from quatro_ray.types import Query, Response
from tests.unit.http_server import Answer, FakeServer, Request, in_turn, serving

pytestmark = pytest.mark.process

EXAMPLE = Path(quatro_ray.__file__).parents[1] / "examples" / "reward_server.py"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "PAUSE_S", 0.02)


def length_reward(request: Request) -> Answer:
    return Answer({"rewards": [len(r) for r in request.body["responses"]], "extra_logs": {"ignored": 1}})


def query(i: int = 0) -> Query:
    return Query(f"q{i}", f"{i}+1=", str(i + 1), {"level": "easy"})


def response(text: str) -> Response:
    return Response(text, len(text), truncated=False)


def with_reward(url: str, work: Callable[[HttpReward], Awaitable[Any]], **fields: Any) -> Any:
    """What `work` returns; nothing of the reward may be left when it is closed."""

    async def run() -> Any:
        config = {"kind": "http", "urls": (url,), "timeout_s": 5, "max_wait_s": 0.05} | fields
        reward = HttpReward(HttpRewardConfig.model_validate(config))
        try:
            return await asyncio.wait_for(work(reward), 60)
        finally:
            await reward.close()
            assert asyncio.all_tasks() == {asyncio.current_task()}

    return asyncio.run(run())


def score(*texts: str) -> Callable[[HttpReward], Awaitable[list[Any]]]:
    async def work(reward: HttpReward) -> list[Any]:
        calls = (reward(query(i), response(text)) for i, text in enumerate(texts))
        return await asyncio.gather(*calls, return_exceptions=True)

    return work


def test_calls_share_a_request_of_openrlhfs_shape() -> None:
    with serving(length_reward) as server:
        assert with_reward(server.url, score("a", "bbb")) == [1.0, 3.0]
    assert [r.body for r in server.requests] == [
        {
            "query": ["0+1=a", "1+1=bbb"],
            "prompts": ["0+1=", "1+1="],
            "responses": ["a", "bbb"],
            "labels": ["1", "2"],
            "metadata": [{"level": "easy"}, {"level": "easy"}],
        }
    ]


def test_a_full_batch_does_not_wait_and_the_rest_waits_no_longer_than_it_may() -> None:
    texts = ["x" * i for i in range(10)]
    with serving(length_reward) as server:
        assert with_reward(server.url, score(*texts), max_batch=4, max_wait_s=2) == list(range(10))
    assert [len(r.body["query"]) for r in server.requests] == [4, 4, 2]
    assert 0.5 < server.requests[2].at - server.requests[0].at < 14


def test_calls_far_apart_have_requests_of_their_own() -> None:
    async def work(reward: HttpReward) -> list[float]:
        return [await reward(query(), response("x" * i)) for i in range(3)]

    with serving(length_reward) as server:
        assert with_reward(server.url, work, max_wait_s=0) == [0, 1, 2]
    assert len(server.requests) == 3


def test_scores_are_rewards_too() -> None:
    with serving(in_turn(Answer({"scores": [0.5]}))) as server:
        assert with_reward(server.url, score("a")) == [0.5]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"rewards": [1.0]}, "answer 2 responses with a list of as many rewards: 1 of them"),
        ({"rewards": [1, 2, 3]}, "3 of them"),
        ({"rewards": 1.0}, "rewards: 1.0"),
        ({"reward": [1, 2]}, "rewards: None"),
        (b'{"rewards": [1, NaN]}', "must be a finite number: nan"),
        (b'{"rewards": [-Infinity, 1]}', "must be a finite number: -inf"),
        (b'{"rewards": [1, 1' + b"0" * 400 + b"]}", "must be a finite number: 1000"),
        ({"rewards": [1, None]}, "must be a finite number: None"),
        ({"rewards": [1, "1"]}, "must be a finite number: '1'"),
        ({"rewards": [1, True]}, "must be a finite number: True"),
        ({"rewards": [1, [1]]}, r"must be a finite number: \[1\]"),
        (b"garbage", "must be a JSON object: b'garbage'"),
    ],
)
def test_an_answer_that_has_no_rewards_gives_no_one_a_reward(answer: Any, message: str) -> None:
    with serving(in_turn(Answer(answer))) as server:
        results = with_reward(server.url, score("a", "b"))
    assert len({id(r) for r in results}) == 2  # an exception each
    for result in results:
        with pytest.raises(RewardUnavailable, match=message):
            raise result


def test_a_failed_batch_does_not_touch_the_next() -> None:
    async def work(reward: HttpReward) -> list[Any]:
        return [await score("a", "b")(reward), await score("a", "b")(reward)]

    with serving(in_turn(Answer(status=400), Answer({"rewards": [1, 2]}))) as server:
        failed, fine = with_reward(server.url, work)
    assert all(isinstance(r, RewardUnavailable) for r in failed) and fine == [1, 2]


def test_machinery_that_recovers_costs_nothing_but_time() -> None:
    with serving(in_turn(Answer(status=500), None, Answer({"rewards": [1, 2]}))) as server:
        assert with_reward(server.url, score("a", "b")) == [1, 2]


@pytest.mark.parametrize("is_sent", [False, True])
def test_one_caller_that_goes_away_takes_none_with_it(is_sent: bool) -> None:
    def slow(request: Request) -> Answer:
        time.sleep(0.4)
        return length_reward(request)

    async def work(reward: HttpReward) -> list[Any]:
        calls = [asyncio.create_task(reward(query(i), response("x" * i))) for i in range(3)]
        await asyncio.sleep(0)
        while is_sent and not server.requests:
            await asyncio.sleep(0.01)
        calls[1].cancel()
        return await asyncio.gather(*calls, return_exceptions=True)

    with serving(slow) as server:
        first, gone, last = with_reward(server.url, work, max_wait_s=0.25)
    assert (first, last) == (0, 2) and isinstance(gone, asyncio.CancelledError)
    assert [len(r.body["query"]) for r in server.requests] == [3 if is_sent else 2]


def test_nothing_is_sent_for_callers_that_are_all_gone() -> None:
    async def work(reward: HttpReward) -> None:
        call = asyncio.create_task(reward(query(), response("x")))
        await asyncio.sleep(0.01)
        call.cancel()
        await asyncio.sleep(0.1)

    with serving(length_reward) as server:
        with_reward(server.url, work)
    assert not server.requests


def test_closing_ends_the_wait_of_everyone() -> None:
    async def work(reward: HttpReward) -> list[Any]:
        sent = [asyncio.create_task(reward(query(i), response("x"))) for i in range(2)]  # a full batch
        await asyncio.sleep(0.1)
        waiting = asyncio.create_task(reward(query(), response("x")))
        await asyncio.sleep(0.01)
        await reward.close()
        late = asyncio.create_task(reward(query(), response("x")))
        return await asyncio.gather(*sent, waiting, late, return_exceptions=True)

    with serving(in_turn(Answer(delay_s=30))) as server:
        start = time.monotonic()
        results = with_reward(server.url, work, max_batch=2, max_wait_s=60)
        assert time.monotonic() - start < 15
    assert [str(r) for r in results] == ["the reward was closed"] * 3 + ["the reward is closed"]
    assert all(isinstance(r, RewardUnavailable) for r in results)


def test_a_mistake_of_our_own_reaches_its_callers() -> None:
    class Broken:
        async def post(self, path: str, body: Any) -> Any:
            raise KeyError("ours")

        async def close(self) -> None:
            pass

    async def run() -> Any:
        config = HttpRewardConfig(kind="http", urls=("http://host",))
        reward = HttpReward(config, Broken())  # type: ignore[arg-type]
        return await asyncio.wait_for(score("a", "b")(reward), 5)

    assert [repr(r) for r in asyncio.run(run())] == ["KeyError('ours')"] * 2


@contextmanager
def example_server(*args: str, **environment: str) -> Iterator[str]:
    command = [sys.executable, str(EXAMPLE), "--port", "0", *args]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | environment)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().split()[-1]
    finally:
        process.terminate()
        process.communicate(timeout=10)


def test_the_example_server_scores() -> None:
    with example_server() as url:
        assert with_reward(url, score("1", " 2\n", "4", "naïve 🙂")) == [1, 1, 0, 0]
        assert with_reward(url, score("1", "1"), max_batch=1) == [1, 0]
        [refused] = with_reward(url, score("x" * (17 * 2**20)), max_tries=1)
    assert isinstance(refused, RewardUnavailable)


def test_the_example_server_asks_for_its_token(monkeypatch: pytest.MonkeyPatch) -> None:
    with example_server("--token-env", "EXAMPLE_TOKEN", EXAMPLE_TOKEN="right") as url:
        for token, expected in (("right", 1.0), ("wrong", "status 401"), (None, "status 401")):
            if token:
                monkeypatch.setenv("EXAMPLE_TOKEN", token)
            [result] = with_reward(url, score("1"), token_env="EXAMPLE_TOKEN" if token else None)
            assert result == expected or str(expected) in str(result)


@pytest.mark.parametrize(
    ("args", "message"), [(["--host", "0.0.0.0"], "--token-env is needed"), (["--token-env", "NOT_SET"], "is not set")]
)
def test_the_example_server_does_not_start_open(args: list[str], message: str) -> None:
    done = subprocess.run([sys.executable, EXAMPLE, *args], capture_output=True, text=True, timeout=20)
    assert done.returncode == 2 and message in done.stderr


def test_two_servers_of_which_one_is_gone() -> None:
    with serving(length_reward) as gone:
        pass  # its port is closed now

    async def run(server: FakeServer) -> list[float]:
        urls = (gone.url, server.url)
        reward = HttpReward(HttpRewardConfig(kind="http", urls=urls, max_batch=1, max_tries=2))
        try:
            return await asyncio.gather(*(reward(query(i), response("x" * i)) for i in range(12)))
        finally:
            await reward.close()

    with serving(length_reward) as server:
        assert asyncio.run(run(server)) == list(range(12))
