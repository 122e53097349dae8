"""The fleet of engines: their health, the choice of the engine for the next group, and the replacement of lost ones.

Nothing here imports Ray: an engine is an actors/interfaces.py:Engine.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from typing import Any, Protocol

from quatro_ray.actors.interfaces import Engine
from quatro_ray.actors.restart_policy import Health, Progress, Record, RestartPolicy
from quatro_ray.config import GeneratorConfig
from quatro_ray.errors import ClusterError, last_line
from quatro_ray.failures import EngineLost
from quatro_ray.telemetry.activity import IDLE, Activity
from quatro_ray.timeouts import within
from quatro_ray.types import EngineLoad

_LAST_WORDS_S = 1.0


class EventSink(Protocol):
    """Receives the events and loads of the engines (telemetry/recorder.py)."""

    def event(self, event: str, part: str, **detail: Any) -> None:
        """Record what happened to an engine.

        Args:
            event: "lost", "recovered", "given_up", or "joined" for an engine beyond `generator.num_engines`.
            part: the engine, as "generator 0"; the number is its index in the fleet.
            detail: further fields of the record, such as the reason of a loss.
        """
        ...

    def engine_load(self, index: int, load: EngineLoad) -> None:
        """Record the load that the engine with this index reported at its latest check."""
        ...


class EngineSlot:
    """One life of an engine; its successor is another slot with the same index."""

    def __init__(
        self,
        index: int,
        client: Engine,
        record: Record,
        on_change: Callable[[EngineSlot], None],
        lost_at: float | None = None,
    ) -> None:
        """Create the slot.

        Args:
            index: position in `Fleet.slots`, and the number in the engine's name "generator N".
            client: calls the engine; a successor has its own client.
            record: health of the engine; it keeps the failures and starts of earlier lives.
            on_change: called when `state()` may have changed.
            lost_at: time at which the last healthy engine of this index was lost, in seconds of the fleet's clock.
        """
        self.index = index
        self.client = client
        self.record = record
        self._on_change = on_change
        self.lost_at = lost_at
        self.num_groups = 0
        self.num_evaluated = 0
        self.kv_cache_usage = 0.0
        self.is_updating = False
        self.is_draining = False
        self.progress = Progress(0, 0.0)

    def update_begins(self) -> None:
        """Expect no progress: a weight update pauses the engine."""
        self.is_updating = True
        self._on_change(self)

    def update_ends(self) -> None:
        """Expect progress again."""
        self.is_updating = False
        self._on_change(self)

    def count(self, num_groups: int, *, evaluates: bool) -> None:
        """Add groups to those that the engine works on, or subtract them."""
        self.num_groups += num_groups
        self.num_evaluated += num_groups if evaluates else 0
        self._on_change(self)

    def state(self) -> str:
        """Return what the engine does, as metrics and timeline name it."""
        match self.record.state:
            case Health.STARTING:
                return "start"
            case Health.DEAD:
                return "lost"
            case _ if self.is_updating:
                return "paused"
            case Health.SYNCING:
                return "wait_weights"
            case _ if self.num_groups == 0:
                return IDLE
        return "evaluate" if self.num_evaluated == self.num_groups else "busy"


class Fleet:
    """Lends healthy engines to groups, and replaces engines that are lost.

    Args:
        spawn: makes the client of a new engine, given its index.
        liveness_deadline_s: after this many seconds without an answer, an engine counts as lost.
        clock: returns seconds that only increase.
        look_every_s: seconds between two looks at an engine's load.
        room: waits until there is room for the engine with an index. Without it, `generator.max_engines` has no effect.
        give_back: gives back the room of the engine with an index, which is given up.
        device_lock: held while an engine starts (actors/device_turns.py). Without it, any number start side by side.
    """

    def __init__(
        self,
        spawn: Callable[[int], Engine],
        config: GeneratorConfig,
        liveness_deadline_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        look_every_s: float = 0.5,
        room: Callable[[int], Awaitable[None]] | None = None,
        give_back: Callable[[int], Awaitable[None]] | None = None,
        device_lock: asyncio.Lock | None = None,
    ) -> None:
        self._spawn = spawn
        self._config = config
        self._liveness_deadline_s = liveness_deadline_s
        self._clock = clock
        self._look_every_s = look_every_s
        self._wait_for_room = room
        self._give_back = give_back
        self._device_lock = device_lock or nullcontext()
        self._policy = RestartPolicy(config.max_restarts)
        self._tasks: asyncio.TaskGroup | None = None
        self._running: set[asyncio.Task[None]] = set()
        self._closed = False
        self._room = asyncio.Condition()
        """Wakes groups that wait for an engine, as many as may find room."""
        self._syncable = asyncio.Condition()
        """Wakes the task that waits for an engine that can take weights."""
        self._watcher: EventSink | None = None
        self.joining = asyncio.Event()
        """Set when a restarted engine waits for weights; the task that sends them clears it."""
        self.num_lost = 0
        self.activity = Activity(clock)
        self._by_load: list[tuple[int, int]] = []
        """A heap of number of groups and index; each engine that takes a group has an entry with its present number."""
        self.slots: list[EngineSlot] = []
        for _ in range(config.num_engines):
            self._add()

    def _add(self) -> EngineSlot:
        index = len(self.slots)
        first = Record(Health.STARTING, self._clock(), incarnation=1)
        slot = EngineSlot(index, self._spawn(index), first, self._changed)
        self.slots.append(slot)
        self._changed(slot)
        return slot

    def _changed(self, slot: EngineSlot) -> None:
        if slot is self.slots[slot.index]:  # a life that is over may still return its groups
            self.activity.enter(slot.index, slot.state())
            self._note_places(slot)

    def started(self, *, synced: bool) -> None:
        """Record that all engines run.

        Args:
            synced: the engines hold the learner's weights already.
        """
        for slot in self.slots:
            self._to(slot, Health.SYNCING)
            if synced:
                self._to(slot, Health.HEALTHY)

    def supervise(self, tasks: asyncio.TaskGroup, watcher: EventSink) -> None:
        """Watch the engines from now on, and replace those that are lost.

        Args:
            tasks: runs the watching tasks; a ClusterError in one of them ends the run.
            watcher: receives the load of each engine about twice a second, and every loss and recovery.
        """
        self._tasks, self._watcher = tasks, watcher
        for slot in self.slots:
            self._run(self._watch(slot))
        if self._wait_for_room is not None and len(self.slots) < self._config.max_num_engines:
            self._run(self._grow(self._wait_for_room))

    async def _grow(self, room: Callable[[int], Awaitable[None]]) -> None:
        """Add an engine each time that there is room for one more."""
        while (index := len(self.slots)) < self._config.max_num_engines:
            await room(index)
            self._run(self._start(self._add()))

    def _run(self, work: Coroutine[Any, Any, None]) -> bool:
        """Start a task and return True, or return False if the run is ending."""
        assert self._tasks is not None, "supervise() must be called first"
        try:
            task = None if self._closed else self._tasks.create_task(work)
        except RuntimeError:  # the task group is being cancelled
            task = None
        if task is None:
            work.close()
            return False
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return True

    def close(self) -> None:
        """Stop watching and replacing engines."""
        self._closed = True
        for task in self._running:
            task.cancel()

    def to_sync(self) -> list[EngineSlot]:
        """Return the engines that can take weights."""
        return [m for m in self.slots if m.record.state in (Health.SYNCING, Health.HEALTHY)]

    def is_any_waiting(self) -> bool:
        """Return whether an engine waits for weights."""
        return any(m.record.state is Health.SYNCING for m in self.slots)

    def num_healthy(self) -> int:
        """Return the number of engines that get work."""
        return sum(m.record.state is Health.HEALTHY for m in self.slots)

    async def some_to_sync(self) -> list[EngineSlot]:
        """Wait until an engine can take weights. The caller bounds the wait."""
        async with self._syncable:
            await self._syncable.wait_for(self.to_sync)
        return self.to_sync()

    def drain(self, indices: Collection[int]) -> None:
        """Give new groups to other engines than these, whose nodes are going away.

        If no other engine is healthy, they keep getting groups: what they finish in time is not lost.
        """
        if not any(m.record.state is Health.HEALTHY and m.index not in indices for m in self.slots):
            indices = ()
        for slot in self.slots:
            if slot.is_draining != (slot.index in indices):
                slot.is_draining = slot.index in indices
                self._note_places(slot)

    async def synced(self, slot: EngineSlot) -> None:
        """Give work to an engine that was verified to hold the current weights."""
        if slot.record.state is Health.SYNCING:
            since = slot.record.since if slot.lost_at is None else slot.lost_at
            is_new = slot.index >= self._config.num_engines and slot.record.incarnation == 1
            self._tell("joined" if is_new else "recovered", slot, seconds=self._clock() - since)
            slot.lost_at = None
        if slot.record.state in (Health.SYNCING, Health.HEALTHY):
            self._to(slot, Health.HEALTHY)
            await self._offer(self._places(slot))

    def for_evaluation(self) -> _ForEvaluation:
        """Return the same engines, for groups that are not trained on; the time they take is counted apart."""
        return _ForEvaluation(self)

    @asynccontextmanager
    async def lend(self, *, evaluates: bool = False) -> AsyncIterator[Engine]:
        """Lend the healthy engine with the fewest groups; each takes at most `max_groups_in_flight`.

        An engine whose key-value cache is fuller than `max_kv_cache_usage` takes no further group: it would wait in
        the engine, where no other can take it.

        An EngineLost inside the `async with` marks the engine as lost and is raised again. The wait for a healthy
        engine has no deadline, because the learner's wait for groups has one.
        """
        async with self._room:
            await self._room.wait_for(self._least_loaded)
            slot = self._least_loaded()
            assert slot is not None
            slot.count(1, evaluates=evaluates)
        try:
            yield slot.client
        except EngineLost as error:
            self.lost(slot, str(error), core_died=error.core_died)
            raise
        finally:
            slot.count(-1, evaluates=evaluates)
            await self._offer(1)

    def _least_loaded(self) -> EngineSlot | None:
        """Return the engine with the fewest groups of those that take one more, without a look at all of them."""
        while self._by_load:
            num_groups, index = self._by_load[0]
            slot = self.slots[index]
            if slot.num_groups == num_groups and self._places(slot) > 0:
                return slot
            heapq.heappop(self._by_load)  # the engine has changed since
        return None

    def _note_places(self, slot: EngineSlot) -> None:
        if len(self._by_load) > 4 * len(self.slots) + 64:  # mostly entries that are out of date
            self._by_load = [(m.num_groups, m.index) for m in self.slots if self._places(m) > 0]
            heapq.heapify(self._by_load)
        elif self._places(slot) > 0:
            heapq.heappush(self._by_load, (slot.num_groups, slot.index))

    def _places(self, slot: EngineSlot) -> int:
        """Return how many more groups an engine takes."""
        if slot.record.state is not Health.HEALTHY or slot.is_draining:
            return 0
        # without a group an engine makes no step, and its last report is of no use
        if slot.num_groups > 0 and slot.kv_cache_usage > self._config.max_kv_cache_usage:
            return 0
        return self._config.max_groups_in_flight - slot.num_groups

    def lost(self, slot: EngineSlot, why: str, *, core_died: bool = False) -> None:
        """End a lost engine and start its successor. Only the first call for an engine has an effect.

        Args:
            slot: the life of the engine that is over; the successor gets a new slot with the same index.
            why: the reason, for the event and for messages.
            core_died: the engine's process died but its actor lives, and may still report partial groups.
        """
        if slot.record.state is Health.DEAD:
            return
        self._to(slot, Health.DEAD)
        if slot.lost_at is None:
            slot.lost_at = self._clock()
        self.num_lost += 1
        self._tell("lost", slot, why=why, groups=slot.num_groups)
        is_replaced = self._run(self._revive(slot, why))
        if not (is_replaced and core_died and self._run(self._kill_after_last_words(slot))):
            slot.client.kill()

    async def _kill_after_last_words(self, slot: EngineSlot) -> None:
        """Kill the actor after a delay in which it reports the tokens that each of its groups has so far."""
        try:
            await asyncio.sleep(_LAST_WORDS_S)
        finally:
            slot.client.kill()

    async def _revive(self, dead: EngineSlot, why: str) -> None:
        """Start a successor after the restart delay; raise ClusterError if too few engines are left."""
        if dead.record.is_given_up(self._policy):
            return await self._give_up(dead, why)
        await asyncio.sleep(self._policy.delay_s(dead.record.failures))
        if self._wait_for_room is not None:
            await self._wait_for_room(dead.index)
        slot = EngineSlot(dead.index, self._spawn(dead.index), dead.record, self._changed, dead.lost_at)
        self.slots[dead.index] = slot
        self._to(slot, Health.STARTING)
        await self._start(slot)

    async def _start(self, slot: EngineSlot) -> None:
        """Start an engine, after which it waits for weights."""
        try:
            async with self._device_lock:
                await within(self._config.start_deadline_s, slot.client.start())
        except TimeoutError:
            return self.lost(slot, f"did not start within generator.start_deadline_s={self._config.start_deadline_s:g}")
        except Exception as error:  # any failure to start is in the event, and the start is tried again
            return self.lost(slot, f"did not start: {last_line(error)}")
        self._to(slot, Health.SYNCING)
        self._run(self._watch(slot))
        self.joining.set()
        async with self._syncable:
            self._syncable.notify_all()

    async def _give_up(self, dead: EngineSlot, why: str) -> None:
        self._tell("given_up", dead, why=why)
        left = sum(not m.record.is_given_up(self._policy) for m in self.slots)
        if left < self._config.min_engines:
            raise ClusterError(
                f"generator {dead.index} was lost {dead.record.failures} times in a row, the last time: {why}. "
                f"{left} engines are left, and generator.min_engines={self._config.min_engines}"
            )
        if self._give_back is not None:
            await self._give_back(dead.index)

    async def _watch(self, slot: EngineSlot) -> None:
        """Query the load of an engine until it is lost."""
        slot.progress = Progress(-1, self._clock())
        while slot.record.state is not Health.DEAD:
            try:
                load = await within(self._liveness_deadline_s, slot.client.load())
            except TimeoutError:
                return self.lost(slot, f"gave no sign of life for {self._liveness_deadline_s:g} s")
            except EngineLost as error:
                return self.lost(slot, str(error))
            if not load.is_alive:
                return self.lost(slot, "its engine core died", core_died=True)
            if why := self._what_is_wrong(slot, load):
                return self.lost(slot, why)
            slot.kv_cache_usage = load.kv_cache_usage
            self._note_places(slot)
            await self._offer(self._places(slot))  # also makes up for a group that was cancelled when it was woken
            if self._watcher is not None:
                self._watcher.engine_load(slot.index, load)
            await asyncio.sleep(self._look_every_s)

    def _what_is_wrong(self, slot: EngineSlot, load: EngineLoad) -> str | None:
        now, deadline = self._clock(), self._config.progress_deadline_s
        num_running = 0 if slot.is_updating else load.num_running
        slot.progress = slot.progress.after(num_running, load.num_sampled_tokens, now)
        if slot.progress.is_hung(now, deadline):
            return f"has {num_running} requests and sampled no token for {deadline:g} s"
        return None

    def _to(self, slot: EngineSlot, state: Health) -> None:
        slot.record = slot.record.to(state, self._clock(), self._policy)
        self._changed(slot)

    async def _offer(self, num_places: int) -> None:
        """Wake so many waiting groups; to wake all of them for each place costs more than the groups themselves."""
        async with self._room:
            self._room.notify(num_places)

    def _tell(self, event: str, slot: EngineSlot, **detail: Any) -> None:
        if self._watcher is not None:
            self._watcher.event(event, f"generator {slot.index}", **detail)


class _ForEvaluation:
    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def lend(self) -> AbstractAsyncContextManager[Engine]:
        return self._fleet.lend(evaluates=True)
