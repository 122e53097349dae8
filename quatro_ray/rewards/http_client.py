"""POSTs JSON to one of several servers that do the same, and says plainly when none of them answered.

What is judged here is only the transport: a server that answers with a JSON object has answered, whatever it says.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import re
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Protocol

import httpx
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

from quatro_ray.errors import ConfigError
from quatro_ray.failures import RewardUnavailable
from quatro_ray.rewards.endpoints import Endpoints

MAX_ANSWER_BYTES = 16 * 2**20
MAX_RETRY_AFTER_S = 30.0
"""What a server asks for beyond this is not waited for: the tries run out instead, and the failure shows."""
EXCERPT_BYTES = 500
PAUSE_S = 0.2
"""Before the second try; doubles from try to try up to MAX_PAUSE_S. On top comes up to PAUSE_S at random."""
MAX_PAUSE_S = 8.0


class RemoteConfig(Protocol):
    """The part of the configuration that a client needs: what HTTP rewards have in common."""

    @property
    def urls(self) -> tuple[str, ...]: ...
    @property
    def token_env(self) -> str | None: ...
    @property
    def timeout_s(self) -> float: ...
    @property
    def max_tries(self) -> int: ...
    @property
    def max_concurrency(self) -> int: ...


class _Failed(Exception):
    """A try that is over; the message says how it ended."""

    url = ""


class _Passing(_Failed):
    """The next try may go better. `retry_after_s`: the server asked to be left alone that long, else 0."""

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class JsonClient:
    """One client for all callers of an event loop.

    Requests go round the urls, and past those that failed a moment ago (rewards/endpoints.py). Tried again, with
    growing pauses: time-outs, lost connections, 429 (after Retry-After) and 5xx. Every other failure is final.

    Redirects are not followed, since the bearer token would travel with them. Proxies and certificates come from the
    environment (HTTPS_PROXY, NO_PROXY, SSL_CERT_FILE), as for curl; loopback addresses never go through a proxy.

    Args:
        config: urls, token_env, timeout_s, max_tries, max_concurrency.
        transport: in place of the network, for tests.

    Raises:
        ConfigError: the variable that token_env names is not set or holds no token; a url cannot be parsed.
    """

    def __init__(self, config: RemoteConfig, *, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._config = config
        self._token = _token(config.token_env)
        self._endpoints = Endpoints([_parsed(url) for url in config.urls])
        self._slots = asyncio.Semaphore(config.max_concurrency)
        # an encoded answer could unpack to far more than the bound on its size
        headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        self._http = httpx.AsyncClient(
            headers=headers,
            timeout=config.timeout_s,
            follow_redirects=False,
            limits=httpx.Limits(max_connections=config.max_concurrency),
            mounts={f"all://{host}": None for host in ("localhost", "127.0.0.1", "[::1]")},  # None: no proxy
            transport=transport,
        )

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to `body`, posted to a url with `path` behind it ("" for the url itself).

        Waits for its turn first where max_concurrency requests are under way; each of those holds its place for no
        longer than timeout_s and what its server asked for by Retry-After.

        Raises:
            RewardUnavailable: no usable answer; names the url of the last try, how it ended, and how many there were.
            ValueError: the body cannot be written as JSON (it holds a NaN, say).
        """
        # ASCII only: half a surrogate pair in a response could not be encoded otherwise
        content = json.dumps(body, allow_nan=False).encode("ascii")
        retrying = AsyncRetrying(
            stop=stop_after_attempt(self._config.max_tries),
            wait=wait_exponential_jitter(initial=PAUSE_S, max=MAX_PAUSE_S, jitter=PAUSE_S),
            retry=retry_if_exception_type(_Passing),
            reraise=True,
        )
        try:
            return await retrying(self._try, path, content)
        except _Failed as error:
            tries = retrying.statistics["attempt_number"]
            message = f"POST {error.url}: {error} (try {tries} of {self._config.max_tries})"
            raise RewardUnavailable(self._without_token(message)) from None

    async def close(self) -> None:
        await self._http.aclose()

    async def _try(self, path: str, content: bytes) -> dict[str, Any]:
        async with self._slots:
            endpoint = self._endpoints.pick()
            # a server that asked for peace gets it; at random so that not all callers come back at once
            await asyncio.sleep(self._endpoints.closed_s(endpoint) * random.uniform(1, 1.1))
            url = endpoint.url.rstrip("/") + path if path else endpoint.url
            try:
                answer = await self._request(url, content)
            except _Failed as error:
                error.url = url
                if isinstance(error, _Passing):
                    self._endpoints.failed(endpoint, error.retry_after_s)
                raise
            self._endpoints.worked(endpoint)
            return answer

    async def _request(self, url: str, content: bytes) -> dict[str, Any]:
        try:
            # httpx's own time-outs are for each read: a server that trickles would never meet them
            async with (
                asyncio.timeout(self._config.timeout_s),
                self._http.stream("POST", url, content=content) as response,
            ):
                await _check_status(response)
                return _parse(await _read(response), response.status_code)
        except (TimeoutError, httpx.TimeoutException) as error:
            raise _Passing(f"no answer within timeout_s={self._config.timeout_s:g} s") from error
        except httpx.RequestError as error:
            raise _Passing(f"connection failed, {type(error).__name__}: {error}") from error

    def _without_token(self, text: str) -> str:
        return text.replace(self._token, "***") if self._token else text


def _token(variable: str | None) -> str | None:
    if variable is None:
        return None
    token = os.environ.get(variable)
    if not token:
        raise ConfigError(
            f"token_env={variable!r} must name an environment variable that holds the bearer token, and {variable} is "
            "not set where the verifiers run: set it there, or leave token_env out if the server asks for none"
        )
    if not re.fullmatch(r"[\x21-\x7e]+", token):
        raise ConfigError(
            f"token_env={variable!r}: the value of {variable} must be printable ASCII without white space "
            "(a line end behind it is the usual cause): correct it"
        )
    return token


def _parsed(url: str) -> str:
    try:
        return str(httpx.URL(url))
    except httpx.InvalidURL as error:
        raise ConfigError(f"urls: {url!r} must be a URL ({error}): correct it") from error


async def _check_status(response: httpx.Response) -> None:
    if response.is_success:
        return
    message = f"status {response.status_code}"
    if response.is_redirect:
        raise _Failed(f"{message}, a redirect, which is not followed because the token would travel: correct urls")
    excerpt = await _excerpt(response)
    message += f", {excerpt!r}" if excerpt else ""
    if response.status_code == 429 or response.is_server_error:
        raise _Passing(message, _retry_after_s(response.headers.get("Retry-After", "")))
    raise _Failed(message)


def _encoding(response: httpx.Response) -> str:
    return response.headers.get("Content-Encoding", "identity")


async def _excerpt(response: httpx.Response) -> str:
    """Its beginning. The rest is not read: the connection is given up instead."""
    if _encoding(response) != "identity":
        return ""
    async for chunk in response.aiter_bytes(EXCERPT_BYTES):
        return chunk.decode(errors="replace").strip()
    return ""


def _retry_after_s(header: str) -> float:
    """Seconds, or a date (RFC 9110, 10.2.3); 0 where it is neither, for then the usual pause does."""
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(header).astimezone(UTC) - datetime.now(UTC)).total_seconds()
        except ValueError:
            return 0.0
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_S) if math.isfinite(seconds) else 0.0


async def _read(response: httpx.Response) -> bytes:
    if (encoding := _encoding(response)) != "identity":
        raise _Failed(f"status {response.status_code}, but with Content-Encoding {encoding}, which was not asked for")
    content = bytearray()
    async for chunk in response.aiter_bytes():
        content += chunk
        if len(content) > MAX_ANSWER_BYTES:
            raise _Failed(f"status {response.status_code}, but the answer must have at most {MAX_ANSWER_BYTES} bytes")
    return bytes(content)


def _parse(content: bytes, status: int) -> dict[str, Any]:
    message = f"status {status}, but the answer must be a JSON object: {content[:EXCERPT_BYTES]!r}"
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError) as error:  # no JSON; nested too deeply
        raise _Failed(message) from error
    if not isinstance(answer, dict):
        raise _Failed(message)
    return answer
