"""The trainer's view of all engines, as vLLM's trainer side expects it (VLLMWeightSyncClient)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


class EngineClient:
    """Fans every call out to all engines at the same time; each phase has its deadline.

    Args:
        engines: opaque handles; submit(engine, method, *args) starts a call and returns its future.
        wait: collects futures within seconds, or raises.
        workers_per_engine: tensor-parallel size; engine i's workers are ranks 1 + i·size and on.
    """

    def __init__(
        self,
        engines: Sequence[Any],
        submit: Callable[..., Any],
        wait: Callable[[list[Any], float], list[Any]],
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
        """Of the weights that are sent next; the caller sets it before each update."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """vLLM hands out one offset for all; engines that are not data-parallel copies need one each."""
        futures = [
            self._submit(
                engine,
                "init_weight_transfer_engine",
                init_info | {"rank_offset": init_info["rank_offset"] + i * self._workers_per_engine},
            )
            for i, engine in enumerate(self._engines)
        ]
        self._wait(futures, self._rendezvous_deadline_s)

    def start_weight_update(self) -> None:
        self._all("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self._all("update_weights", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Stamps `version`; vLLM's trainer side itself passes none."""
        self._all("finish_weight_update", self.version)

    def _all(self, method: str, *args: Any) -> None:
        self._wait([self._submit(engine, method, *args) for engine in self._engines], self._transfer_deadline_s)
