"""The trainer's client of all engines; implements vLLM's VLLMWeightSyncClient."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol


class Submit(Protocol):
    """Starts a call of an engine's method and returns its future."""

    def __call__(self, engine: Any, method: str, *args: Any) -> Any:
        """Start `method` of an engine with `args`, and return the future of its result."""
        ...


class EngineClient:
    """Fans every call out to all engines at the same time; the rendezvous and each update have a deadline.

    Args:
        engines: handles that only `submit` looks into.
        submit: starts a call.
        wait: collects futures within a number of seconds, or raises. If one fails, it raises at once.
        workers_per_engine: devices of an engine; the workers of engine i are the ranks from 1 + i·size on.
        rendezvous_deadline_s: for connecting.
        transfer_deadline_s: for all calls of an update together.
        on_failure: called with the reason before a failure is raised. The thread that exchanges data with the engines
            may be stuck because of this failure, so it cannot be the one to notice it.
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
        on_failure: Callable[[str], object],
    ) -> None:
        self._engines = engines
        self._submit = submit
        self._wait = wait
        self._workers_per_engine = workers_per_engine
        self._rendezvous_deadline_s = rendezvous_deadline_s
        self._transfer_deadline_s = transfer_deadline_s
        self._on_failure = on_failure
        self._version = 0
        self._update_ends_at = 0.0
        """On the clock of time.monotonic."""

    def begin_update(self, version: int) -> None:
        """Begin an update whose weights are `version`; call it before the others."""
        self._version = version
        self._update_ends_at = time.monotonic() + self._transfer_deadline_s

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connect all engines, each with its own rank offset if the back end has ranks.

        vLLM gives one offset for all, which suits data-parallel replicas; our engines are independent of each other.
        """

        def own(i: int) -> dict[str, Any]:
            if "rank_offset" not in init_info:
                return init_info
            return init_info | {"rank_offset": init_info["rank_offset"] + i * self._workers_per_engine}

        each = [(own(i),) for i in range(len(self._engines))]
        self._call("init_weight_transfer_engine", each, self._rendezvous_deadline_s)

    def start_weight_update(self) -> None:
        """Prepare all engines to receive a whole set of weights."""
        self._update("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        """Let all engines receive the tensors whose names, dtypes and shapes `update_info` lists."""
        self._update("update_weights", update_info)

    def receive_adapter(self, tensors: Mapping[str, Any]) -> None:
        """Give all engines the tensors of an adapter."""
        self._update("receive_adapter", tensors)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Stamp the engines with the version of `begin_update`; vLLM's trainer side passes no version."""
        self._update("finish_weight_update", self._version)

    def _update(self, method: str, *args: Any) -> None:
        self._call(method, [args] * len(self._engines), max(0.0, self._update_ends_at - time.monotonic()))

    def _call(self, method: str, args: Sequence[tuple[Any, ...]], deadline_s: float) -> None:
        """Call a method of all engines, with the arguments of each."""
        try:
            calls = zip(self._engines, args, strict=True)
            self._wait([self._submit(engine, method, *own) for engine, own in calls], deadline_s)
        except BaseException as error:
            self._on_failure(f"{method} failed: {error}")
            raise
