"""The JSON client against real servers that are well, slow, broken, gone, or hostile."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import httpx
import pytest

from quatro_ray.config import HttpRewardConfig
from quatro_ray.errors import ConfigError
from quatro_ray.failures import RewardUnavailable
from quatro_ray.rewards import http_client
from quatro_ray.rewards.endpoints import REST_S, Endpoints
from quatro_ray.rewards.http_client import JsonClient
from tests.unit.http_server import Answer, FakeServer, Request, in_turn, serving

pytestmark = pytest.mark.process

FINE = Answer({"fine": True})


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "PAUSE_S", 0.02)


def config_of(*servers: FakeServer | str, **fields: Any) -> HttpRewardConfig:
    urls = tuple(s if isinstance(s, str) else s.url for s in servers)
    return HttpRewardConfig.model_validate({"kind": "http", "urls": urls, "timeout_s": 5} | fields)


def post(*servers: FakeServer | str, path: str = "", body: Any = None, times: int = 1, **fields: Any) -> Any:
    async def run() -> Any:
        client = JsonClient(config_of(*servers, **fields))
        try:
            for _ in range(times):
                answer = await asyncio.wait_for(client.post(path, body or {"a": 1}), 60)
            return answer
        finally:
            await client.close()

    return asyncio.run(run())


def unavailable(message: str | None = None) -> pytest.RaisesExc[RewardUnavailable]:
    return pytest.raises(RewardUnavailable, match=message)


def dead_url() -> str:
    """Of a port that was free a moment ago."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{s.getsockname()[1]}"


def test_a_request_and_its_answer() -> None:
    with serving(in_turn(FINE)) as server:
        assert post(server, path="/run_code", body={"text": "naïve \ud800 🙂"}) == {"fine": True}
    request = server.requests[0]
    assert request.path == "/run_code" and request.body == {"text": "naïve \ud800 🙂"}
    assert request.headers["Content-Type"] == "application/json" and "Authorization" not in request.headers


@pytest.mark.parametrize(
    ("url", "path", "asked"), [("/score", "", "/score"), ("/v1/", "/x", "/v1/x"), ("/v1/", "", "/v1/")]
)
def test_the_path_is_put_behind_the_url(url: str, path: str, asked: str) -> None:
    with serving(in_turn(FINE)) as server:
        post(server.url + url, path=path)
    assert server.requests[0].path == asked


def test_the_token_comes_from_the_environment_and_never_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_TOKEN", "s3cret-token")
    with serving(in_turn(FINE, Answer(b"denied: Bearer s3cret-token", 403))) as server:
        post(server, token_env="REWARD_TOKEN")
        with unavailable() as caught:
            post(server, token_env="REWARD_TOKEN")
    assert [r.headers["Authorization"] for r in server.requests] == ["Bearer s3cret-token"] * 2
    assert "status 403, 'denied: Bearer ***'" in str(caught.value) and caught.value.__cause__ is None


@pytest.mark.parametrize(("value", "message"), [(None, "is not set where"), ("two\n", "printable ASCII")])
def test_a_missing_or_broken_token_is_an_error_of_the_configuration(
    value: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REWARD_TOKEN", raising=False)
    if value is not None:
        monkeypatch.setenv("REWARD_TOKEN", value)
    with pytest.raises(ConfigError, match=message) as caught:
        JsonClient(config_of("http://host", token_env="REWARD_TOKEN"))
    assert "token_env='REWARD_TOKEN'" in str(caught.value) and "two" not in str(caught.value)


def test_a_url_that_cannot_be_parsed_is_an_error_of_the_configuration() -> None:
    with pytest.raises(ConfigError, match="urls: 'http://host:port' must be a URL"):
        JsonClient(config_of("http://host:port"))


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422, 302])
def test_what_the_next_try_would_not_change_fails_at_once(status: int) -> None:
    with serving(in_turn(Answer(b"no", status, {"Location": "/elsewhere"}))) as server, unavailable() as caught:
        post(server)
    assert re.match(rf"POST {server.url}: status {status}.*\(try 1 of 4\)", str(caught.value))
    assert len(server.requests) == 1


@pytest.mark.parametrize("first", [Answer(status=500), Answer(b"x", 503), Answer(status=429), None])
def test_what_passes_is_tried_again(first: Answer | None) -> None:
    with serving(in_turn(first, first, FINE)) as server:
        assert post(server) == {"fine": True}
    assert len(server.requests) == 3


def test_the_tries_run_out() -> None:
    with serving(in_turn(Answer(b"overloaded", 503))) as server, unavailable() as caught:
        post(server, max_tries=2)
    assert str(caught.value) == f"POST {server.url}: status 503, 'overloaded' (try 2 of 2)"
    assert len(server.requests) == 2


@pytest.mark.parametrize(("kind", "least_s"), [("seconds", 1.0), ("date", 0.5), ("nonsense", 0.0)])
def test_a_server_that_asks_for_peace_gets_it(kind: str, least_s: float) -> None:
    def answer(request: Request) -> Answer:
        soon = format_datetime(
            datetime.now(UTC) + timedelta(seconds=2), usegmt=True
        )  # in 1 to 2 s: it has no fractions
        headers = {"Retry-After": {"seconds": "1", "date": soon, "nonsense": "later"}[kind]}
        return FINE if len(server.requests) > 1 else Answer(status=429, headers=headers)

    with serving(answer) as server:
        post(server)
    assert server.requests[1].at - server.requests[0].at >= least_s


@pytest.mark.parametrize(("header", "seconds"), [("1e9", 30), ("-5", 0), ("nan", 0), ("inf", 0), ("", 0), ("7.5", 7.5)])
def test_how_long_it_can_ask_for_is_bounded(header: str, seconds: float) -> None:
    assert http_client._retry_after_s(header) == seconds


def test_while_one_server_wants_peace_the_other_is_asked() -> None:
    busy = Answer(status=429, headers={"Retry-After": "30"})
    with serving(in_turn(busy)) as first, serving(in_turn(FINE)) as second:
        start = time.monotonic()
        post(first, second, times=4)
    assert time.monotonic() - start < 15
    assert (len(first.requests), len(second.requests)) == (1, 4)


def test_requests_go_round_and_past_a_dead_server() -> None:
    with serving(in_turn(FINE)) as first, serving(in_turn(FINE)) as second:
        post(first, dead_url(), second, times=8)
    assert len(first.requests) + len(second.requests) == 8
    assert min(len(first.requests), len(second.requests)) >= 3


def test_no_server_at_all() -> None:
    with unavailable(r"connection failed, ConnectError.*\(try 3 of 3\)"):
        post(dead_url(), max_tries=3)


def test_health_on_a_clock_of_its_own() -> None:
    now = 100.0
    ends = Endpoints(["a", "b", "c"], clock=lambda: now)
    assert [ends.pick().url for _ in range(4)] == ["a", "b", "c", "a"]
    b, c, a = (ends.pick() for _ in range(3))
    ends.failed(b, 0)
    assert [ends.pick().url for _ in range(4)] == ["c", "a", "c", "a"]
    ends.failed(a, 50)
    now += 1
    ends.failed(c, 0)
    assert ends.pick() is b and ends.closed_s(b) == 0  # all rest: the one that is soonest well again
    now += REST_S
    assert {ends.pick().url for _ in range(3)} == {"b", "c"} and ends.closed_s(a) == 50 - 1 - REST_S
    ends.worked(a)  # one answer does not make it open before its time
    assert {ends.pick().url for _ in range(3)} == {"b", "c"}


@pytest.mark.parametrize("slow", [Answer(delay_s=30), Answer(b"{" + b" " * 600, trickle_s=0.05)])
def test_the_deadline_holds_for_silent_and_for_trickling_servers(slow: Answer) -> None:
    start = time.monotonic()
    with serving(in_turn(slow)) as server, unavailable(r"no answer within timeout_s=0.3 s \(try 2 of 2\)"):
        post(server, timeout_s=0.3, max_tries=2)
    assert time.monotonic() - start < 15


@pytest.mark.parametrize(
    "content", [b"", b"<html>", b"[1]", b"1", b"null", b'{"a"', b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"9" * 5000]
)
def test_what_is_no_json_object_fails(content: bytes) -> None:
    with serving(in_turn(Answer(content))) as server, unavailable("200, but the answer must be a JSON object: b'"):
        post(server)
    assert len(server.requests) == 1


def test_a_huge_answer_is_not_read_to_its_end() -> None:
    """It never ends: only a client that stops reading comes back."""
    endless = Answer(b"[" + b" " * (40 * 2**20), headers={"Content-Length": str(2**40)})
    with serving(in_turn(endless)) as server, unavailable("must have at most 16777216 bytes"):
        post(server)
    encoded = Answer(b"x", headers={"Content-Encoding": "gzip"})
    with serving(in_turn(encoded)) as server, unavailable("Content-Encoding gzip"):
        post(server)


def test_no_more_requests_than_allowed_at_a_time() -> None:
    together = threading.Barrier(3)

    def answer(request: Request) -> Answer:
        together.wait(30)  # three run at one time, or this fails
        return Answer({})

    async def run(server: FakeServer) -> None:
        client = JsonClient(config_of(server, max_concurrency=3, timeout_s=60))
        await asyncio.gather(*(client.post("", {}) for _ in range(12)))
        await client.close()

    with serving(answer) as server:
        asyncio.run(run(server))
    assert len(server.requests) == 12 and server.most_running == 3


def test_loopback_does_not_go_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with serving(in_turn(FINE)) as server, serving(in_turn(Answer({"proxy": True}))) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("http_proxy", proxy.url)
        for host in ("127.0.0.1", "localhost"):
            assert post(f"http://{host}:{server.server_port}") == {"fine": True}
        assert post("http://rewards.example") == {"proxy": True}
    assert proxy.requests[0].path == "http://rewards.example/"


def test_a_body_that_is_no_json_is_the_callers_mistake() -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        post("http://127.0.0.1:9", body={"a": float("nan")})


def test_a_transport_can_stand_in_for_the_network() -> None:
    async def run() -> Any:
        transport = httpx.MockTransport(lambda request: httpx.Response(200, json={"url": str(request.url)}))
        client = JsonClient(config_of("https://rewards.example/v1"), transport=transport)
        return await client.post("/run", {})

    assert asyncio.run(run()) == {"url": "https://rewards.example/v1/run"}
