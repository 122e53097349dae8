"""The trainer's client of all engines; implements vLLM's VLLMWeightSyncClient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol


class Submit(Protocol):
    """Starts a call of an engine's method and returns its future."""

    def __call__(self, engine: Any, method: str, *args: Any) -> Any:
        """Start `method` of an engine with `args`, and return the future of its result."""
        ...


class EngineClient:
    """Fans every call out to all engines at the same time; each phase has its deadline.

    Args:
        engines: handles that only `submit` looks into.
        submit: starts a call.
        wait: collects futures within a number of seconds, or raises.
        workers_per_engine: devices of an engine; the workers of engine i are the ranks from 1 + i·size on.
        rendezvous_deadline_s: for connecting.
        transfer_deadline_s: for each of the calls of an update.
    """

    def __init__(
        self,
        engines: Sequence[Any],
        submit: Submit,
        wait: Callable[[list[Any], float], object],
        *,
        workers_per_engine: int,
        rendezvous_deadline_s: float,
        transfer_deadline_s: float,
    ) -> None:
        self._engines = engines
        self._submit = submit
        self._wait = wait
        self._workers_per_engine = workers_per_engine
        self._rendezvous_deadline_s = rendezvous_deadline_s
        self._transfer_deadline_s = transfer_deadline_s
        self.version = 0
        """Version of the weights that are sent next; the caller sets it before each update."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connect all engines, each with its own rank offset if the back end has ranks.

        vLLM gives one offset for all, which suits data-parallel replicas; our engines are independent of each other.
        """

        def own(i: int) -> dict[str, Any]:
            if "rank_offset" not in init_info:
                return init_info
            return init_info | {"rank_offset": init_info["rank_offset"] + i * self._workers_per_engine}

        futures = [
            self._submit(engine, "init_weight_transfer_engine", own(i)) for i, engine in enumerate(self._engines)
        ]
        self._wait(futures, self._rendezvous_deadline_s)

    def start_weight_update(self) -> None:
        """Prepare all engines to receive a whole set of weights."""
        self._all("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        """Let all engines receive the tensors whose names, dtypes and shapes `update_info` lists."""
        self._all("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Stamp the engines with `self.version`; vLLM's trainer side passes no version."""
        self._all("finish_weight_update", self.version)

    def _all(self, method: str, *args: Any) -> None:
        self._wait([self._submit(engine, method, *args) for engine in self._engines], self._transfer_deadline_s)
