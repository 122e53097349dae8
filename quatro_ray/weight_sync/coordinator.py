"""One owner drives a whole weight update: pause → (connect) → transfer → resume → verify, a deadline on each phase.

An engine is given work only while it is known to hold a whole version. One that fails a phase by itself is taken out
and comes back by a later update. Where the transfer fails, every engine of it may hold a part of the new weights, and
vLLM cannot start a layer's update over: all of them are started again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from quatro_ray.config import WeightSyncConfig
from quatro_ray.errors import WeightSyncError
from quatro_ray.failures import TransferFailed
from quatro_ray.timeouts import within


class Sender(Protocol):
    """What an update needs of the learner; both raise TransferFailed or LearnerLost."""

    async def open_transfer(self, engines: Sequence[Any]) -> None: ...
    async def send_weights(self, version: int) -> None: ...


class Engines(Protocol):
    """What an update needs of the fleet (actors/fleet.py): members with a `client` that pauses, resumes and tells its
    version."""

    async def some_to_sync(self) -> list[Any]: ...
    async def synced(self, member: Any) -> None: ...
    def lost(self, member: Any, why: str, *, core_died: bool = False) -> None: ...


@dataclass(frozen=True)
class Update:
    """What one update did. `num_in_flight`: groups that were being generated and went on afterwards."""

    version: int
    num_in_flight: int
    pause_s: float
    transfer_s: float


class WeightSyncCoordinator:
    """Requests that run during an update are kept: they continue under the new weights."""

    MAX_TRIES = 5

    def __init__(self, engines: Engines, sender: Sender, config: WeightSyncConfig, engine_deadline_s: float) -> None:
        """`engine_deadline_s`: for the first engine to be there, where none is."""
        self._engines = engines
        self._sender = sender
        self._config = config
        self._engine_deadline_s = engine_deadline_s
        self._connected: list[Any] = []

    def disconnect(self) -> None:
        """The learner's end is gone: the next update connects anew."""
        self._connected = []

    async def update(self, version: int) -> Update:
        """Brings all engines to `version`; returns when at least one has it.

        Raises:
            WeightSyncError: no engine could be brought to it, tries included.
            LearnerLost: the learner is the one that failed.
        """
        why = ""
        for _ in range(self.MAX_TRIES):
            try:
                members = await within(self._engine_deadline_s, self._engines.some_to_sync())
            except TimeoutError as error:
                raise WeightSyncError(f"no engine ran within {self._engine_deadline_s:g} s; {why}") from error
            try:
                if (update := await self._once(version, members)) is not None:
                    return update
            except TransferFailed as failure:
                why = str(failure)
        raise WeightSyncError(f"no engine took version {version} in {self.MAX_TRIES} tries; the last: {why}")

    async def _once(self, version: int, members: list[Any]) -> Update | None:
        """None where no engine is left that holds the version."""
        start = time.monotonic()
        for member in members:
            member.paused = True
        in_flight = await self._each(members, "pause", self._config.pause_deadline_s)
        paused = list(in_flight)
        if not paused:
            return None
        await self._connect(paused)
        sending = time.monotonic()
        await self._send(version, paused)
        sent = time.monotonic()
        resumed = await self._each(paused, "resume", self._config.resume_deadline_s)
        paused_s = time.monotonic() - start
        have = await self._each(list(resumed), "policy_version", self._config.resume_deadline_s)
        for member, reported in have.items():
            member.paused = False
            if reported == version:
                await self._engines.synced(member)
            else:
                self._engines.lost(member, f"reports version {reported} after an update to version {version}")
        if version not in have.values():
            return None
        return Update(version, sum(in_flight[m] for m in have), paused_s, sent - sending)

    async def _connect(self, members: list[Any]) -> None:
        """Nothing where the members are those of the last update. Raises TransferFailed; no weights were touched."""
        if self._connected == members:
            return
        self._connected = []
        try:
            await self._sender.open_transfer([m.client for m in members])
        except TransferFailed:
            alive = await self._each(members, "policy_version", self._config.resume_deadline_s)
            if len(alive) == len(members):  # all answer, so that nobody can be blamed alone
                for member in members:
                    self._engines.lost(member, "could not be connected to the learner")
            raise
        self._connected = members

    async def _send(self, version: int, members: list[Any]) -> None:
        try:
            await self._sender.send_weights(version)
        except BaseException as error:  # a cancellation as well: what they hold is unknown
            self._connected = []
            for member in members:
                self._engines.lost(member, f"its weights are in doubt, the update to version {version} failed: {error}")
            raise

    async def _each(self, members: list[Any], method: str, deadline_s: float) -> dict[Any, Any]:
        """By member, what it answered; one that did not is lost."""

        async def ask(member: Any) -> Any:
            work: Awaitable[Any] = getattr(member.client, method)()
            return await within(deadline_s, work)

        answers = await asyncio.gather(*(ask(m) for m in members), return_exceptions=True)
        found = {}
        for member, answer in zip(members, answers, strict=True):
            if isinstance(answer, TimeoutError):
                self._engines.lost(member, f"weight sync: {method!r} missed its deadline of {deadline_s:g} s")
            elif isinstance(answer, Exception):
                core_died = getattr(answer, "core_died", False)
                self._engines.lost(member, f"weight sync: {method!r} failed: {answer}", core_died=core_died)
            elif isinstance(answer, BaseException):
                raise answer
            else:
                found[member] = answer
        return found
