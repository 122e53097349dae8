"""POSTs JSON to one of several equivalent servers, with retries.

Only the transport counts here: any JSON object in a successful response is an answer, whatever its content.
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
from typing import Protocol

import httpx
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

from quatro_ray.errors import ConfigError
from quatro_ray.failures import RewardUnavailable
from quatro_ray.rewards.endpoints import Endpoints

MAX_ANSWER_BYTES = 16 * 2**20
MAX_RETRY_AFTER_S = 30.0
"""Longest Retry-After that is honoured: beyond it, the tries run out and the failure becomes visible."""
EXCERPT_BYTES = 500
PAUSE_S = 0.2
"""Pause before the second try. It doubles with every try up to MAX_PAUSE_S, plus a random jitter of up to PAUSE_S."""
MAX_PAUSE_S = 8.0


class RemoteConfig(Protocol):
    """The fields of the configuration that a client needs, which all HTTP rewards have."""

    @property
    def urls(self) -> tuple[str, ...]:
        """Addresses of equivalent servers, http:// or https://, which are used in turn."""
        ...

    @property
    def token_env(self) -> str | None:
        """Name of the environment variable that holds the bearer token, or None to send no token."""
        ...

    @property
    def timeout_s(self) -> float:
        """Limit for one try, in seconds."""
        ...

    @property
    def max_tries(self) -> int:
        """Number of tries for each request, the first one included."""
        ...

    @property
    def max_concurrency(self) -> int:
        """Number of requests that one client has in flight at most."""
        ...


class _Failed(Exception):
    """A try failed; the message says how, and no other try is made unless it is a _Transient."""

    url = ""


class _Transient(_Failed):
    """A try failed, but the next one may succeed; `retry_after_s`: seconds that the server asked to wait, or 0."""

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class JsonClient:
    """A client that all callers of an event loop share.

    Requests go to the urls in turn, and pass over those that failed recently (rewards/endpoints.py). Time-outs, lost
    connections, 429 (after Retry-After) and 5xx are retried with growing pauses. Every other failure is final.

    Redirects are not followed, because the bearer token would be sent along. Proxies and certificates come from the
    environment (HTTPS_PROXY, NO_PROXY, SSL_CERT_FILE), as for curl; loopback addresses never go through a proxy.

    Args:
        config: urls, token_env, timeout_s, max_tries, max_concurrency.
        transport: replaces the network, in tests.

    Raises:
        ConfigError: the variable that token_env names is not set or holds no valid token, or a url cannot be parsed.
    """

    def __init__(self, config: RemoteConfig, *, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._config = config
        self._token = _token(config.token_env)
        self._endpoints = Endpoints([_parsed(url) for url in config.urls])
        self._slots = asyncio.Semaphore(config.max_concurrency)
        # identity: a compressed answer could unpack to far more than MAX_ANSWER_BYTES
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

    async def post(self, path: str, body: dict[str, object]) -> dict[str, object]:
        """POST `body` and return the answer.

        If max_concurrency requests are in flight, this waits until one of them ends; each takes no longer than
        timeout_s plus what its server asked for by Retry-After.

        Args:
            path: appended to the url; "" for the url itself.
            body: what JSON can hold, without NaN and infinities.

        Raises:
            RewardUnavailable: no try gave an answer; the message has the url and the failure of the last try, and the
                number of tries.
            ValueError: the body cannot be written as JSON (because of a NaN, for example).
        """
        # ASCII only: a lone surrogate in a response could not be encoded otherwise
        content = json.dumps(body, allow_nan=False).encode("ascii")
        retrying = AsyncRetrying(
            stop=stop_after_attempt(self._config.max_tries),
            wait=wait_exponential_jitter(initial=PAUSE_S, max=MAX_PAUSE_S, jitter=PAUSE_S),
            retry=retry_if_exception_type(_Transient),
            reraise=True,
        )
        try:
            return await retrying(self._try, path, content)
        except _Failed as error:
            tries = retrying.statistics["attempt_number"]
            message = f"POST {error.url}: {error} (try {tries} of {self._config.max_tries})"
            raise RewardUnavailable(self._without_token(message)) from None

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def _try(self, path: str, content: bytes) -> dict[str, object]:
        async with self._slots:
            endpoint = self._endpoints.pick()
            # wait as long as the server asked; the jitter keeps the callers from coming back all at once
            await asyncio.sleep(self._endpoints.closed_s(endpoint) * random.uniform(1, 1.1))
            url = endpoint.url.rstrip("/") + path if path else endpoint.url
            try:
                answer = await self._request(url, content)
            except _Failed as error:
                error.url = url
                if isinstance(error, _Transient):
                    self._endpoints.failed(endpoint, error.retry_after_s)
                raise
            self._endpoints.worked(endpoint)
            return answer

    async def _request(self, url: str, content: bytes) -> dict[str, object]:
        try:
            # httpx's own time-outs are for each read: a server that sends a byte at a time would never exceed them
            async with (
                asyncio.timeout(self._config.timeout_s),
                self._http.stream("POST", url, content=content) as response,
            ):
                await _check_status(response)
                return _parse(await _read(response), response.status_code)
        except (TimeoutError, httpx.TimeoutException) as error:
            raise _Transient(f"no answer within timeout_s={self._config.timeout_s:g} s") from error
        except httpx.RequestError as error:
            raise _Transient(f"connection failed, {type(error).__name__}: {error}") from error

    def _without_token(self, text: str) -> str:
        return text.replace(self._token, "***") if self._token else text


def _token(variable: str | None) -> str | None:
    if variable is None:
        return None
    token = os.environ.get(variable)
    if not token:
        raise ConfigError(
            f"token_env={variable!r} must name an environment variable that holds the bearer token, but {variable} is "
            "not set where the verifiers run: set it there, or remove token_env if the server needs no token"
        )
    if not re.fullmatch(r"[\x21-\x7e]+", token):
        raise ConfigError(
            f"token_env={variable!r}: the value of {variable} must be printable ASCII without white space "
            "(a trailing newline is the usual cause): correct it"
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
        raise _Failed(
            f"{message}, a redirect, which is not followed because the token would be sent along: correct urls"
        )
    excerpt = await _excerpt(response)
    message += f", {excerpt!r}" if excerpt else ""
    if response.status_code == 429 or response.is_server_error:
        raise _Transient(message, _retry_after_s(response.headers.get("Retry-After", "")))
    raise _Failed(message)


def _encoding(response: httpx.Response) -> str:
    return str(response.headers.get("Content-Encoding", "identity"))


async def _excerpt(response: httpx.Response) -> str:
    """Return the beginning of the content. The rest is not read; the connection is dropped instead."""
    if _encoding(response) != "identity":
        return ""
    async for chunk in response.aiter_bytes(EXCERPT_BYTES):
        return chunk.decode(errors="replace").strip()
    return ""


def _retry_after_s(header: str) -> float:
    """Return the seconds that a Retry-After header asks for; it has seconds or a date (RFC 9110, 10.2.3), else 0."""
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
        raise _Failed(f"status {response.status_code}, but with Content-Encoding {encoding}, which was not requested")
    content = bytearray()
    async for chunk in response.aiter_bytes():
        content += chunk
        if len(content) > MAX_ANSWER_BYTES:
            raise _Failed(f"status {response.status_code}, but the answer must have at most {MAX_ANSWER_BYTES} bytes")
    return bytes(content)


def _parse(content: bytes, status: int) -> dict[str, object]:
    message = f"status {status}, but the answer must be a JSON object: {content[:EXCERPT_BYTES]!r}"
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError) as error:  # ValueError: not JSON; RecursionError: nested too deeply
        raise _Failed(message) from error
    if not isinstance(answer, dict):
        raise _Failed(message)
    return answer
