"""Coordinates a weight update, with a deadline on each phase.

If engines can hold a second copy of the weights, they generate during the transfer:

    (connect) → receive → send → install (pause, load, resume) → verify → (check)

Otherwise the new weights replace the old ones as they arrive:

    pause → (connect) → send → resume → verify → (check)

An engine gets work only while it is known to hold a whole version. An engine that fails a phase by itself is removed,
and a later update takes it in again after its restart. If the transfer fails, every engine in it may hold part of the
new weights, and vLLM cannot restart the update of a layer, so all of them are restarted.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from quatro_ray.config import WeightSyncConfig
from quatro_ray.errors import WeightSyncError
from quatro_ray.failures import TransferFailed
from quatro_ray.timeouts import within
from quatro_ray.types import Installed
from quatro_ray.weight_sync.agreement import AgreementCheck, WeightComparison, mean_difference

_logger = logging.getLogger(__name__)


class Sender(Protocol):
    """The learner's part in an update; both methods raise TransferFailed or LearnerLost."""

    async def open_transfer(self, engines: Sequence[Any]) -> None:
        """Connect the learner to exactly these engines, given by their clients; replaces an earlier connection."""
        ...

    async def send_weights(self, version: int) -> None:
        """Send the learner's weights to the connected engines. Those that are paused then hold `version`."""
        ...


class Engine(Protocol):
    """A generation engine, as far as an update calls it (engines/generation.py:GenerationEngine)."""

    async def pause(self) -> int:
        """Freeze running requests, and return how many groups and turns of episodes there are."""
        ...

    async def resume(self) -> None:
        """Continue the frozen requests under the present weights."""
        ...

    async def receive_weights(self) -> None:
        """Begin to receive weights while generation continues."""
        ...

    async def install_weights(self, version: int) -> Installed:
        """Load the received weights; running requests are paused and continue under `version`."""
        ...

    async def policy_version(self) -> int:
        """Return the version of the weights, as the engine's own process reports it."""
        ...

    async def score(self, sequences: list[list[int]]) -> list[list[float]]:
        """Return the log-prob of each token but the first, in nats at temperature 1."""
        ...

    async def sampling_error(self, sequences: list[list[int]]) -> float:
        """Return the mean difference of sampled tokens' log-probs from their scores, nats at temperature 1."""
        ...

    async def parameter_checksums(self) -> list[dict[str, str]]:
        """Return dtype, shape and checksum of each worker's parameters by name (weight_sync/checksums.py)."""
        ...


class Slot(Protocol):
    """An engine's place in the fleet (actors/fleet.py:EngineSlot)."""

    @property
    def index(self) -> int:
        """The number of the engine, which its successor has too."""
        ...

    @property
    def client(self) -> Engine:
        """The client of the engine."""
        ...

    def update_begins(self) -> None:
        """Expect no progress of the engine: an update pauses it."""
        ...

    def update_ends(self) -> None:
        """Expect progress again."""
        ...


SlotT = TypeVar("SlotT", bound=Slot)


class Engines(Protocol[SlotT]):
    """The fleet's part in an update (actors/fleet.py:Fleet)."""

    async def some_to_sync(self) -> list[SlotT]:
        """Wait until at least one engine can take weights, and return all that can."""

    async def synced(self, slot: SlotT, /) -> None:
        """Record that the engine holds the new version."""

    def lost(self, slot: SlotT, /, why: str, *, core_died: bool = False) -> None:
        """Remove the engine and have it restarted."""


@dataclass(frozen=True)
class Update:
    """Outcome of one update.

    Attributes:
        version: the policy version that the engines hold now.
        num_in_flight: groups and turns of episodes that were paused and then continued.
        pause_s: time during which generation was paused, seconds; the longest of all engines.
        transfer_s: time of the transfer alone, seconds.
        logprob_abs_diff: largest mean difference between an engine and the learner, or between an engine's sampled
            log-probs and its scores, nats; None without a check.
    """

    version: int
    num_in_flight: int
    pause_s: float
    transfer_s: float
    logprob_abs_diff: float | None = None


class WeightSyncCoordinator(Generic[SlotT]):
    """Brings engines to a new policy version. Running requests are kept and continue under the new weights.

    Args:
        engine_deadline_s: how long an update waits for a first engine if none is there.
        generates_during_transfer: engines receive weights beside their own and load them afterwards. If False, they are
            paused for the whole update.
        agreement: holds engines against the learner. An engine that differs gets the weights again, then is restarted,
            then the run ends. None: engines are not checked.
    """

    MAX_TRIES = 5

    def __init__(
        self,
        engines: Engines[SlotT],
        sender: Sender,
        config: WeightSyncConfig,
        engine_deadline_s: float,
        *,
        generates_during_transfer: bool,
        agreement: AgreementCheck | None = None,
    ) -> None:
        self._engines = engines
        self._sender = sender
        self._config = config
        self._engine_deadline_s = engine_deadline_s
        self._deliver = self._receive_and_install if generates_during_transfer else self._pause_and_send
        self._connected: list[SlotT] = []
        self._last_failure = ""
        self._agreement = agreement
        self._comparison = WeightComparison()
        self._num_updates = 0
        self._disagreements: dict[int, int] = {}
        """Failed checks in a row by the index of the engine, which its successor shares."""

    def disconnect(self) -> None:
        """Forget the connection, because the learner's end is gone; the next update makes a new one."""
        self._connected = []

    async def update(self, version: int) -> Update:
        """Bring the engines to `version`, and return when at least one has it.

        Raises:
            WeightSyncError: no engine took the version in MAX_TRIES tries, or one differs from the learner even after a
                restart.
            LearnerLost: the learner failed.
        """
        self._last_failure = "no engine was there"
        for _ in range(self.MAX_TRIES):
            try:
                slots = await within(self._engine_deadline_s, self._engines.some_to_sync())
            except TimeoutError as error:
                raise WeightSyncError(
                    f"no engine ran within {self._engine_deadline_s:g} s; the last failure: {self._last_failure}"
                ) from error
            try:
                if (update := await self._once(version, slots)) is not None:
                    self._num_updates += 1
                    return update
            except TransferFailed as failure:
                self._last_failure = str(failure)
        raise WeightSyncError(
            f"no engine took version {version} in {self.MAX_TRIES} tries; the last failure: {self._last_failure}"
        )

    async def _once(self, version: int, slots: list[SlotT]) -> Update | None:
        """Try once; return None if no engine is left that holds the version."""
        installed, transfer_s = await self._deliver(version, slots)
        for slot, now in installed.items():
            if now.version != version:
                self._lost(slot, f"reports version {now.version} after an update to version {version}")
        right = [slot for slot, now in installed.items() if now.version == version]
        agreeing, difference = await self._check(right, version)
        if not agreeing:
            return None
        for slot in agreeing:
            await self._engines.synced(slot)
        num_in_flight = sum(now.num_in_flight for now in installed.values())
        pause_s = max(now.pause_s for now in installed.values())
        return Update(version, num_in_flight, pause_s, transfer_s, difference)

    async def _receive_and_install(self, version: int, slots: list[SlotT]) -> tuple[dict[SlotT, Installed], float]:
        """Transfer the weights while the engines generate, and then let them load.

        Returns:
            The engines that loaded the weights, and the time of the transfer, seconds.
        """
        if self._connected != slots:
            with _paused(slots):  # an engine stands still until the learner meets it
                await self._connect(slots)
        if not await self._receive(slots):
            return {}, 0.0
        transfer_s = await self._send(version, slots)
        with _paused(slots):
            installed = await self._each(slots, "install_weights", self._config.transfer_deadline_s, version)
        return installed, transfer_s

    async def _receive(self, slots: list[SlotT]) -> bool:
        """Let all engines begin to receive; return False if one of them does not.

        An engine that hangs is found here, alone: a transfer that waited for it would fail for all.
        """
        self._connected = []  # unless all receive, some wait for what this connection sends next
        receiving = await self._each(slots, "receive_weights", self._config.pause_deadline_s)
        if len(receiving) < len(slots):
            return False
        self._connected = slots
        return True

    async def _pause_and_send(self, version: int, slots: list[SlotT]) -> tuple[dict[SlotT, Installed], float]:
        """Transfer the weights while the engines are paused; returns what _receive_and_install does."""
        start = time.monotonic()
        with _paused(slots):
            in_flight = await self._each(slots, "pause", self._config.pause_deadline_s)
            paused = list(in_flight)
            if not paused:
                return {}, 0.0
            if self._connected != paused:
                await self._connect(paused)
            transfer_s = await self._send(version, paused)
            resumed = await self._each(paused, "resume", self._config.resume_deadline_s)
            pause_s = time.monotonic() - start
            have = await self._each(list(resumed), "policy_version", self._config.resume_deadline_s)
        return {slot: Installed(have[slot], in_flight[slot], pause_s) for slot in have}, transfer_s

    async def _check(self, slots: list[SlotT], version: int) -> tuple[list[SlotT], float | None]:
        """Return the engines that agree with the learner, or none if one has to get the weights again; if not due, all.

        The second value is the largest mean difference of an engine, nats; None if nothing was measured.
        """
        check = self._agreement
        if check is None or not slots or (self._num_updates % check.every_updates and not self._disagreements):
            return slots, None
        expected = await check.learner.score_fixed(check.max_tokens)
        if not expected:
            return slots, None
        sequences = [scored.token_ids for scored in expected]
        scores = await self._each(slots, "score", check.deadline_s, sequences)
        sampled = await self._each(list(scores), "sampling_error", check.deadline_s, sequences)
        differences: dict[SlotT, float] = {}
        agreeing = []
        for slot, of_samples in sampled.items():
            of_scores = mean_difference(expected, scores[slot])
            differences[slot] = float(np.maximum(of_scores, of_samples))  # NaN if one of them is
            if differences[slot] <= check.max_nats:
                agreeing.append(slot)
            else:
                own = f", and what it samples from its own scores by {of_samples:.3g} nats,"
                what = f"differs from the learner by {of_scores:.3g} nats{own} under version {version}"
                self._disagrees(slot, f"{what}; at most {check.max_nats:g} nats are rounding")
        agreeing = await self._with_right_weights(agreeing, version)
        for slot in agreeing:
            self._disagreements.pop(slot.index, None)
        largest = max(differences.values(), default=None)
        to_refit = any(self._disagreements.get(slot.index) == 1 for slot in differences)
        return ([] if to_refit else agreeing), largest

    async def _with_right_weights(self, slots: list[SlotT], version: int) -> list[SlotT]:
        """Return the engines whose parameters are the learner's, bit by bit, as far as both store them alike."""
        check = self._agreement
        assert check is not None
        held = await self._each(slots, "parameter_checksums", check.deadline_s)
        if not held:
            return []
        workers = [worker for engine in held.values() for worker in engine]
        dtypes = {name: checksum.split()[0] for worker in workers for name, checksum in worker.items()}
        expected = await check.learner.parameter_checksums(dtypes)
        wrong = dict(zip(held, self._comparison.wrong(expected, list(held.values())), strict=True))
        for slot, names in wrong.items():
            if names:
                rest = f" and {len(names) - 3} others" if len(names) > 3 else ""
                what = f"holds other weights than the learner in {', '.join(names[:3])}{rest}"
                self._disagrees(slot, f"{what} under version {version}")
        return [slot for slot, names in wrong.items() if not names]

    def _disagrees(self, slot: SlotT, what: str) -> None:
        """Let the engine get the weights again; the second time in a row, restart it; the third time, end the run."""
        times = self._disagreements[slot.index] = self._disagreements.get(slot.index, 0) + 1
        if times == 1:
            self._last_failure = f"generator {slot.index} {what}"
            _logger.warning("%s; it gets the weights again", self._last_failure)
        elif times == 2:
            self._lost(slot, f"{what}, also after it got the weights again")
        else:
            raise WeightSyncError(
                f"generator {slot.index} {what}, also after a restart. The engine does not load weights right, or an "
                "argument in generator.engine_args changes what it samples: see docs/models.md, or set "
                "weight_sync.max_logprob_abs_diff if this is rounding"
            )

    async def _connect(self, slots: list[SlotT]) -> None:
        """Connect the learner to exactly these engines.

        Raises:
            TransferFailed: the connection failed; no weights were touched.
        """
        self._connected = []
        try:
            await self._sender.open_transfer([slot.client for slot in slots])
        except TransferFailed:
            alive = await self._each(slots, "policy_version", self._config.resume_deadline_s)
            if len(alive) == len(slots):  # all answer, so the fault cannot be laid at one of them
                for slot in slots:
                    self._lost(slot, "could not be connected to the learner")
            raise
        self._connected = slots

    async def _send(self, version: int, slots: list[SlotT]) -> float:
        """Send the weights to the connected engines, and return the time that it took, seconds."""
        start = time.monotonic()
        try:
            await self._sender.send_weights(version)
        except BaseException as error:  # after a cancellation, too, it is unknown what the engines hold
            self._connected = []
            for slot in slots:
                self._lost(slot, f"its weights are in doubt, the update to version {version} failed: {error}")
            raise
        return time.monotonic() - start

    async def _each(self, slots: list[SlotT], method: str, deadline_s: float, *args: Any) -> dict[SlotT, Any]:
        """Call a method of all engines, and return the answers by slot; engines that do not answer are lost."""

        async def ask(slot: SlotT) -> Any:
            work: Awaitable[Any] = getattr(slot.client, method)(*args)
            return await within(deadline_s, work)

        answers = await asyncio.gather(*(ask(slot) for slot in slots), return_exceptions=True)
        found: dict[SlotT, Any] = {}
        for slot, answer in zip(slots, answers, strict=True):
            if isinstance(answer, TimeoutError):
                self._lost(slot, f"weight sync: {method!r} missed its deadline of {deadline_s:g} s")
            elif isinstance(answer, Exception):
                core_died = getattr(answer, "core_died", False)
                self._lost(slot, f"weight sync: {method!r} failed: {answer}", core_died=core_died)
            elif isinstance(answer, BaseException):
                raise answer
            else:
                found[slot] = answer
        return found

    def _lost(self, slot: SlotT, why: str, *, core_died: bool = False) -> None:
        self._last_failure = why
        self._engines.lost(slot, why, core_died=core_died)


@contextmanager
def _paused(slots: Sequence[Slot]) -> Iterator[None]:
    """Mark the engines as paused by an update inside the `with` block."""
    for slot in slots:
        slot.update_begins()
    try:
        yield
    finally:
        for slot in slots:
            slot.update_ends()
