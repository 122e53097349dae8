"""All ranks of the learner as one unit: if one rank is lost, the others are killed and the learner is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from quatro_ray.actors.calls import ACTOR_DIED, value_of
from quatro_ray.config import LearnerConfig, WeightSyncConfig
from quatro_ray.engines.checkpoint_store import Digests
from quatro_ray.errors import QuatroError, last_line
from quatro_ray.failures import LearnerLost, TransferFailed
from quatro_ray.timeouts import within
from quatro_ray.weight_sync.agreement import Scored

T = TypeVar("T")

_LOOK_EVERY_S = 1.0


class LearnerGroup:
    """Calls every rank, and returns the result of rank 0 if all ranks return the same.

    Every method raises LearnerLost if a rank died, failed, or missed its deadline. The state of the other ranks is
    then unknown, so all ranks are killed and `restart` must be called. A QuatroError of a rank is raised unchanged,
    because a restart would meet it again.

    Args:
        spawn: makes the actors of all ranks, in the order of their ranks.
        backend: "nccl", "ipc", "gloo" or "adapter", for weight transfer.
        workers_per_engine: devices of an engine.
    """

    def __init__(
        self,
        spawn: Callable[[], Sequence[Any]],
        config: LearnerConfig,
        sync: WeightSyncConfig,
        backend: str,
        workers_per_engine: int,
    ) -> None:
        self._spawn = spawn
        self._config = config
        self._sync = sync
        self._backend = backend
        self._workers_per_engine = workers_per_engine
        self._runs = asyncio.Event()
        self.actors = list(spawn())

    async def start(self) -> None:
        """Connect the ranks to each other and load the starting policy."""
        deadline = self._config.start_deadline_s
        address, port = await self._on_head(deadline, "address", "free_port")
        await self._all("start", address, port, deadline_s=deadline)
        self._runs.set()

    async def restart(self) -> None:
        """Replace all ranks by new ones, which have the starting policy."""
        self._runs.clear()  # ranks that come up are busy, not dead
        self.kill()
        self.actors = list(self._spawn())
        await self.start()

    def kill(self) -> None:
        """Kill all ranks."""
        for actor in self.actors:
            ray.kill(actor)

    async def load_checkpoint(self, folder: Path, version: int) -> None:
        """Load a checkpoint; its policy has the number `version` from now on."""
        await self._all("load_checkpoint", folder, version, deadline_s=self._config.start_deadline_s)

    async def set_version(self, version: int) -> None:
        """Give the present weights the number `version`."""
        await self._all("set_version", version, deadline_s=self._config.start_deadline_s)

    async def train_step(self, leased: Any, version: int) -> dict[str, Any]:
        """Train one optimiser step, and return its metrics.

        Args:
            leased: reference to a LeasedBatch, the second value of ReplayActor.lease.
            version: the version that the step trains from.
        """
        return (await self._all("train_step", leased, version, deadline_s=self._config.step_deadline_s))[0]

    async def score_fixed(self, max_tokens: int) -> list[Scored]:
        """Return the fixed sequences, of at most `max_tokens` tokens each, with the learner's log-probs."""
        scores: list[Scored] = (await self._all("score_fixed", max_tokens, deadline_s=self._sync.check_deadline_s))[0]
        return scores

    async def parameter_checksums(self, dtypes: dict[str, str]) -> dict[str, str]:
        """Return dtype, shape and checksum of the weights, cast to these dtypes, by name."""
        deadline = self._sync.check_deadline_s
        found: dict[str, str] = (await self._all("parameter_checksums", dtypes, deadline_s=deadline))[0]
        return found

    async def open_transfer(self, engines: Sequence[Any]) -> None:
        """Connect to exactly these engines; replaces an earlier connection.

        Args:
            engines: generator clients.

        Raises:
            TransferFailed: the connection failed, and the ranks live.
        """
        deadline = self._sync.rendezvous_deadline_s
        address, port = await self._on_head(deadline, "address", "free_port")
        handles = [engine.actor for engine in engines]
        how = (self._backend, handles, self._workers_per_engine, address, port, self._sync)
        await self._transfer("open_weight_transfer", *how, deadline_s=deadline)

    async def send_weights(self, version: int) -> None:
        """Send the weights of `version` to the connected engines.

        Raises:
            TransferFailed: the transfer failed, and the ranks live.
        """
        await self._transfer("send_weights", version, deadline_s=self._sync.transfer_deadline_s)

    async def _transfer(self, method: str, *args: Any, deadline_s: float) -> None:
        """Call a method of all ranks. If it fails, end the connection, and wait until all ranks are free again.

        Raises:
            TransferFailed: the call failed, and every rank is free for the next try.
            LearnerLost: a rank died, or is still stuck after weight_sync.rendezvous_deadline_s.
        """
        refs = [getattr(actor, method).remote(*args) for actor in self.actors]
        try:
            await self._answer(method, asyncio.gather(*map(value_of, refs)), deadline_s, TransferFailed)
        except TransferFailed as failure:
            free_within_s = self._sync.rendezvous_deadline_s
            closing = value_of(self.actors[0].close_weight_transfer.remote(str(failure)))
            await self._answer("close_weight_transfer", closing, free_within_s, LearnerLost)
            ends = asyncio.gather(*map(value_of, refs), return_exceptions=True)
            await self._answer(f"{method}, which was aborted ({failure}),", ends, free_within_s, LearnerLost)
            raise

    async def save_checkpoint(self, folder: Path, deadline_s: float) -> Digests:
        """Write a checkpoint, and return the digests of its files by name."""
        shares = await self._all("save_checkpoint", folder, deadline_s=deadline_s)
        return {name: digest for share in shares for name, digest in share.items()}

    async def export(self, path: Path, deadline_s: float) -> None:
        """Write the weights in Hugging Face format."""
        await self._all("export", path, deadline_s=deadline_s)

    async def watch(self, liveness_deadline_s: float) -> str:
        """Wait until a rank dies or gives no sign of life, kill all ranks, and return the reason.

        All ranks are killed so that every call that waits for one of them fails.

        Args:
            liveness_deadline_s: after this many seconds without an answer, a rank counts as dead.
        """
        while True:
            await self._runs.wait()
            actors, why = self.actors, ""
            try:
                await within(liveness_deadline_s, asyncio.gather(*(value_of(a.beat.remote()) for a in actors)))
            except TimeoutError:
                why = f"a rank gave no sign of life for {liveness_deadline_s:g} s"
            except RayError as error:
                why = f"a rank died: {last_line(error)}"
            if why and actors is self.actors:  # otherwise they were replaced during the check
                self.kill()
                return why
            await asyncio.sleep(_LOOK_EVERY_S)

    async def stacks(self) -> list[str]:
        """Return the stacks of all threads, for each rank."""
        return await asyncio.gather(*(value_of(a.stacks.remote()) for a in self.actors))

    async def _on_head(self, deadline_s: float, *methods: str) -> list[Any]:
        calls = asyncio.gather(*(value_of(getattr(self.actors[0], m).remote()) for m in methods))
        return await self._answer(methods[0], calls, deadline_s, LearnerLost)

    async def _all(self, method: str, *args: Any, deadline_s: float) -> list[Any]:
        calls = asyncio.gather(*(value_of(getattr(a, method).remote(*args)) for a in self.actors))
        return await self._answer(method, calls, deadline_s, LearnerLost)

    async def _answer(self, method: str, calls: Awaitable[T], deadline_s: float, failure: type[Exception]) -> T:
        """Return the answers; an exception inside a rank becomes `failure`."""
        try:
            return await within(deadline_s, calls)
        except TimeoutError as error:
            raise self._failed(failure, f"learner: {method} missed its deadline of {deadline_s:g} s") from error
        except RayTaskError as error:
            if isinstance(error.cause, QuatroError):
                raise error.cause from error
            raise self._failed(failure, f"learner: {method} failed: {last_line(error)}") from error
        except ACTOR_DIED as error:
            raise self._failed(LearnerLost, f"learner: a rank died in {method}: {last_line(error)}") from error

    def _failed(self, failure: type[Exception], why: str) -> Exception:
        """Return the exception to raise; if the learner is lost, kill all ranks, which `watch` then reports."""
        if failure is LearnerLost:
            self.kill()
        return failure(why)
