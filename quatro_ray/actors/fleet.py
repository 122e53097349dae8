"""The engines that sample: who is healthy, who gets the next group, and how one that is lost comes back.

Nothing here knows Ray: an engine is what actors/generator_client.py:GeneratorClient is, or a fake of that.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Protocol

from quatro_ray.actors.restart_policy import Health, Progress, Record, RestartPolicy
from quatro_ray.config import GeneratorConfig
from quatro_ray.errors import ClusterError, last_line
from quatro_ray.failures import EngineLost
from quatro_ray.timeouts import within

_LOOK_EVERY_S = 0.5
_LAST_WORDS_S = 1.0


class EventSink(Protocol):
    """Where the fleet tells what happens; telemetry/recorder.py is one."""

    def event(self, event: str, part: str, **detail: Any) -> None: ...

    def engine_load(self, index: int, load: Any) -> None: ...


class EngineSlot:
    """One life of an engine; its successor is another member with the same index."""

    def __init__(self, index: int, client: Any, record: Record, lost_at: float | None = None) -> None:
        """`lost_at`: when the last of this index that had work was lost."""
        self.index = index
        self.client = client
        self.record = record
        self.lost_at = lost_at
        self.num_groups = 0
        self.paused = False
        self.progress = Progress(0, 0.0)


class Fleet:
    """
    Args:
        spawn: makes the client of a new engine, given its index.
    """

    def __init__(
        self,
        spawn: Callable[[int], Any],
        config: GeneratorConfig,
        liveness_deadline_s: float,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._spawn = spawn
        self._config = config
        self._liveness_deadline_s = liveness_deadline_s
        self._clock = clock
        self._policy = RestartPolicy(config.max_restarts)
        self._tasks: asyncio.TaskGroup | None = None
        self._running: set[asyncio.Task[None]] = set()
        self._closed = False
        self._changed = asyncio.Condition()
        self._watcher: EventSink | None = None
        self.joining = asyncio.Event()
        """Set when an engine waits for weights; who brings them clears it."""
        self.num_lost = 0
        self.members = [
            EngineSlot(i, spawn(i), Record(Health.STARTING, clock(), incarnation=1)) for i in range(config.num_engines)
        ]

    def started(self, *, synced: bool) -> None:
        """All members run; `synced`: with the weights of the learner."""
        for member in self.members:
            self._to(member, Health.SYNCING)
            if synced:
                self._to(member, Health.HEALTHY)

    def supervise(self, tasks: asyncio.TaskGroup, watcher: EventSink) -> None:
        """From now on the members are looked at, and replaced when they are lost."""
        self._tasks, self._watcher = tasks, watcher
        for member in self.members:
            self._run(self._watch(member))

    def _run(self, work: Coroutine[Any, Any, None]) -> bool:
        """False where the run is ending: nothing new is begun."""
        assert self._tasks is not None, "supervise() comes first"
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
        """Nobody is looked at or replaced any more."""
        self._closed = True
        for task in self._running:
            task.cancel()

    def to_sync(self) -> list[EngineSlot]:
        """Those that can take weights."""
        return [m for m in self.members if m.record.state in (Health.SYNCING, Health.HEALTHY)]

    def is_any_waiting(self) -> bool:
        """For weights."""
        return any(m.record.state is Health.SYNCING for m in self.members)

    def num_healthy(self) -> int:
        return sum(m.record.state is Health.HEALTHY for m in self.members)

    async def some_to_sync(self) -> list[EngineSlot]:
        """Waits until there is one; whoever calls holds the deadline."""
        async with self._changed:
            await self._changed.wait_for(self.to_sync)
        return self.to_sync()

    async def synced(self, member: EngineSlot) -> None:
        """It holds the current weights, verified: it gets work."""
        if member.record.state is Health.SYNCING:
            since = member.record.since if member.lost_at is None else member.lost_at
            self._tell("recovered", member, seconds=self._clock() - since)
            member.lost_at = None
        if member.record.state in (Health.SYNCING, Health.HEALTHY):
            self._to(member, Health.HEALTHY)
            await self._notify()

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[Any]:
        """The client of the healthy engine with the fewest groups, at most `max_groups_in_flight` each.

        An EngineLost inside of the `async with` takes the engine out, and is raised on. Waits without a deadline of its
        own where no engine is healthy: whoever waits for the groups has one.
        """
        async with self._changed:
            await self._changed.wait_for(self._free)
            member = min(self._free(), key=lambda m: m.num_groups)
            member.num_groups += 1
        try:
            yield member.client
        except EngineLost as error:
            self.lost(member, str(error), core_died=error.core_died)
            raise
        finally:
            member.num_groups -= 1
            await self._notify()

    def _free(self) -> list[EngineSlot]:
        limit = self._config.max_groups_in_flight
        return [m for m in self.members if m.record.state is Health.HEALTHY and m.num_groups < limit]

    def lost(self, member: EngineSlot, why: str, *, core_died: bool = False) -> None:
        """Ends it, whatever is left of it, and starts its successor. Says so once for each life."""
        if member.record.state is Health.DEAD:
            return
        self._to(member, Health.DEAD)
        if member.lost_at is None:
            member.lost_at = self._clock()
        self.num_lost += 1
        self._tell("lost", member, why=why, groups=member.num_groups)
        is_replaced = self._run(self._revive(member, why))
        if not (is_replaced and core_died and self._run(self._kill_after_last_words(member))):
            member.client.kill()

    async def _kill_after_last_words(self, member: EngineSlot) -> None:
        """Its actor still tells of each group how far it came; nothing new comes from it."""
        try:
            await asyncio.sleep(_LAST_WORDS_S)
        finally:
            member.client.kill()

    async def _revive(self, dead: EngineSlot, why: str) -> None:
        """Raises ClusterError where too few engines are left to go on."""
        if dead.record.is_given_up(self._policy):
            return self._give_up(dead, why)
        await asyncio.sleep(self._policy.delay_s(dead.record.failures))
        member = EngineSlot(dead.index, self._spawn(dead.index), dead.record, dead.lost_at)
        self._to(member, Health.STARTING)
        self.members[dead.index] = member
        try:
            await within(self._config.start_deadline_s, member.client.start())
        except TimeoutError:
            return self.lost(
                member, f"did not start within generator.start_deadline_s={self._config.start_deadline_s:g}"
            )
        except Exception as error:  # whatever kept it from starting is in the event, and tried again
            return self.lost(member, f"did not start: {last_line(error)}")
        self._to(member, Health.SYNCING)
        self._run(self._watch(member))
        self.joining.set()
        await self._notify()

    def _give_up(self, dead: EngineSlot, why: str) -> None:
        self._tell("given_up", dead, why=why)
        left = sum(not m.record.is_given_up(self._policy) for m in self.members)
        if left < self._config.min_engines:
            raise ClusterError(
                f"generator {dead.index} was lost {dead.record.failures} times in a row, the last time: {why}. "
                f"{left} engines are left, and generator.min_engines={self._config.min_engines}"
            )

    async def _watch(self, member: EngineSlot) -> None:
        """Looks at it until it is lost; a look holds up nothing but itself."""
        member.progress = Progress(-1, self._clock())
        while member.record.state is not Health.DEAD:
            try:
                load = await within(self._liveness_deadline_s, member.client.load())
            except TimeoutError:
                return self.lost(member, f"gave no sign of life for {self._liveness_deadline_s:g} s")
            except EngineLost as error:
                return self.lost(member, str(error))
            if not load["is_alive"]:
                return self.lost(member, "its engine core died", core_died=True)
            if why := self._what_is_wrong(member, load):
                return self.lost(member, why)
            if self._watcher is not None:
                self._watcher.engine_load(member.index, load)
            await asyncio.sleep(_LOOK_EVERY_S)

    def _what_is_wrong(self, member: EngineSlot, load: dict[str, Any]) -> str | None:
        now, deadline = self._clock(), self._config.progress_deadline_s
        num_running = 0 if member.paused else load["num_running"]
        member.progress = member.progress.after(num_running, load["num_sampled_tokens"], now)
        if member.progress.is_hung(now, deadline):
            return f"has {num_running} requests and sampled no token for {deadline:g} s"
        return None

    def _to(self, member: EngineSlot, state: Health) -> None:
        member.record = member.record.to(state, self._clock(), self._policy)

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _tell(self, event: str, member: EngineSlot, **detail: Any) -> None:
        if self._watcher is not None:
            self._watcher.event(event, f"generator {member.index}", **detail)
