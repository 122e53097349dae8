"""Submits a training run to a Ray cluster as a job, follows it, and ends as it ended."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import secrets
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import aiohttp
import requests
from ray.exceptions import AuthenticationError, RayError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from quatro_ray.errors import ClusterError, last_line
from quatro_ray.jobs.package import CONFIG, JobPackage, pack

_API_ERRORS = (OSError, RuntimeError, ValueError, RayError, requests.RequestException)
"""The exceptions that Ray's job client raises if the cluster does not answer, or refuses."""
_NOT_IN_IDS = re.compile(r"[^A-Za-z0-9_-]")
_MAX_FILES_SHOWN = 20
_LOOK_EVERY_S = 2.0
_SILENCE_S = 300.0
"""Seconds without an answer of the cluster after which it is not waited for any longer."""
_LAST_LINES_S = 10.0
"""Seconds that the end of the log may take to arrive after the job has ended."""
_STOPPED = 128 + signal.SIGTERM
"""Exit status of a run that was told to stop; Ray does not keep that of a stopped job."""


def submit(
    config: Path,
    overrides: Sequence[str],
    address: str | None,
    say: Callable[[str], None],
    *,
    include: Sequence[Path] = (),
    variables: Sequence[str] = (),
    wait: bool = True,
) -> int:
    """Submit `quatro-ray train` with a configuration and the local files that it names.

    Args:
        config: the YAML file.
        overrides: as `load_config` takes them.
        address: URL of the cluster's dashboard; None: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or http://127.0.0.1:8265.
        say: shows a line.
        include: see `pack`.
        variables: see `pack`.
        wait: follow the job until it ends. SIGINT and SIGTERM stop it; a second one leaves it to itself.

    Returns:
        The exit status of the run: 0 if it has finished, 143 if it was stopped. Without `wait` always 0.

    Raises:
        ConfigError: see `pack`.
        ClusterError: the cluster does not answer, refuses the job, or was silent for five minutes.
    """
    with tempfile.TemporaryDirectory(prefix="quatro_ray_job_") as folder:
        package = pack(config, overrides, Path(folder), include=include, variables=variables)
        client = _connect(address)
        job = _send(client, package, Path(folder))
    say(f"job {job}: submitted with {len(package.files)} local files; run.dir={package.config.run.dir}")
    for file in package.files[:_MAX_FILES_SHOWN]:
        say(f"  {file}")
    if (num_more := len(package.files) - _MAX_FILES_SHOWN) > 0:
        say(f"  and {num_more} more")
    if not wait:
        return 0
    return asyncio.run(_Follower(client, job, say).follow())


def _connect(address: str | None) -> JobSubmissionClient:
    for module in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{module}").setLevel(logging.WARNING)
    try:
        return JobSubmissionClient(address)
    except _API_ERRORS as error:
        _refuse(address, error)


def _send(client: JobSubmissionClient, package: JobPackage, folder: Path) -> str:
    # Ray would leave out what a .gitignore among the files names
    os.environ.setdefault("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "1")
    run_dir = package.config.run.dir
    try:
        return client.submit_job(
            entrypoint=f"quatro-ray train {CONFIG}",
            submission_id=f"quatro-ray-{_NOT_IN_IDS.sub('-', run_dir.name)}-{secrets.token_hex(4)}",
            runtime_env={"working_dir": str(folder), "env_vars": package.environment},
            metadata={"run_dir": str(run_dir)},
        )
    except _API_ERRORS as error:
        _refuse(client.get_address(), error)


def _refuse(address: str | None, error: Exception) -> NoReturn:
    why = error.message.splitlines()[0] if isinstance(error, AuthenticationError) else last_line(error)
    raise ClusterError(
        f"--address {address or '(not set)'}: the job could not be submitted ({why}); give the URL of the "
        "cluster's dashboard, such as http://127.0.0.1:8265, and set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN as on the "
        "cluster"
    ) from error


class _Follower:
    """Prints the log of a job, passes signals on to it, and waits for its end by its status."""

    def __init__(self, client: JobSubmissionClient, job: str, say: Callable[[str], None]) -> None:
        self._client = client
        self._job = job
        self._say = say
        self._num_shown = 0
        self._stops: set[asyncio.Task[None]] = set()
        self._leaves = asyncio.Event()

    async def follow(self) -> int:
        """Return the exit status of the run."""
        with self._signals():
            log = asyncio.create_task(self._show_log())
            try:
                details = await self._end()
                await asyncio.wait([log], timeout=_LAST_LINES_S if details else 0)
            finally:
                for task in (log, *self._stops):
                    task.cancel()
                await asyncio.gather(log, *self._stops, return_exceptions=True)
        if details is None:
            self._say(f"job {self._job} is left to itself; `ray job logs --follow {self._job}` shows it")
            return 128 + signal.SIGINT
        await self._show_the_rest()
        return self._status_of(details)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGINT, signal.SIGTERM)
        for number in numbers:
            loop.add_signal_handler(number, self._stop, number)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def _stop(self, number: int) -> None:
        if self._stops:
            return self._leaves.set()
        self._say(f"{signal.Signals(number).name}: the job is told to stop; again: leave it to itself")
        self._stops.add(asyncio.create_task(self._tell_to_stop()))

    async def _tell_to_stop(self) -> None:
        while True:
            try:
                await asyncio.to_thread(self._client.stop_job, self._job)
                return
            except _API_ERRORS as error:
                self._say(f"the job could not be told to stop ({last_line(error)}); trying again")
                await asyncio.sleep(_LOOK_EVERY_S)

    async def _end(self) -> JobDetails | None:
        """Return the details of the job that has ended, or None if it is left to itself."""
        answered = said = time.monotonic()
        while not self._leaves.is_set():
            try:
                details = await asyncio.to_thread(self._client.get_job_info, self._job)
            except _API_ERRORS as error:
                if time.monotonic() - answered > _SILENCE_S:
                    raise ClusterError(
                        f"the cluster has not answered for {_SILENCE_S:g} s ({last_line(error)}), and job {self._job} "
                        f"may still run: `ray job status {self._job}` tells"
                    ) from error
            else:
                answered = time.monotonic()
                if details.status.is_terminal():
                    return details
                if details.status == JobStatus.PENDING and answered - said > 5 * _LOOK_EVERY_S:
                    self._say(f"job {self._job} is pending: {details.message}")
                    said = answered
            with suppress(TimeoutError):
                await asyncio.wait_for(self._leaves.wait(), _LOOK_EVERY_S)
        return None

    async def _show_log(self) -> None:
        """Print the log as it grows. After a lost connection, Ray sends it again from the start."""
        while True:
            num_sent = 0
            with suppress(OSError, RuntimeError, aiohttp.ClientError):  # the next look at the status says what is wrong
                async for text in self._client.tail_job_logs(self._job):
                    num_sent += len(text)
                    if (num_new := num_sent - self._num_shown) > 0:
                        print(text[-num_new:], end="", flush=True)
                        self._num_shown = num_sent
                if (await asyncio.to_thread(self._client.get_job_info, self._job)).status.is_terminal():
                    return
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _show_the_rest(self) -> None:
        """Print what did not come before the job ended: Ray closes the connection without the last lines."""
        try:
            log = await asyncio.to_thread(self._client.get_job_logs, self._job)
        except _API_ERRORS as error:
            self._say(f"the end of the job's output cannot be read ({last_line(error)})")
        else:
            print(log[self._num_shown :], end="", flush=True)

    def _status_of(self, details: JobDetails) -> int:
        """Return the run's own exit status, and say how the job ended."""
        self._say(f"job {self._job}: {details.status.lower()}")
        if details.status == JobStatus.STOPPED:
            return _STOPPED
        code = details.driver_exit_code
        if code is None:  # it was never started
            self._say(str(details.message))
            return 1
        return code if code >= 0 else 128 - code
