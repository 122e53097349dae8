"""Writes checkpoints, and exports of the policy in Hugging Face format, while the run continues."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from quatro_ray.actors.interfaces import Learner, Replay
from quatro_ray.config import Config
from quatro_ray.engines.checkpoint_store import (
    LEDGER,
    Checkpoint,
    CheckpointStore,
    check_room,
    replace_folder,
    size_of,
)
from quatro_ray.errors import CheckpointError
from quatro_ray.telemetry.recorder import Recorder

T = TypeVar("T")
_TRY_AGAIN_S = 10.0


@dataclass(frozen=True)
class RunState:
    """The content of a checkpoint besides the learner's shards.

    Attributes:
        step: optimiser steps of the policy.
        version: version of the policy.
        saved: JSON values, which recovery.py restores.
    """

    step: int
    version: int
    saved: Mapping[str, object]


class CheckpointWriter:
    """Writes checkpoints and exports while generation continues.

    A write that does not fit on the disk is reported and skipped. The last one of a run waits for space instead.

    Args:
        lock: held while the learner is used.
        state: returns what the next checkpoint holds; called with the lock held.
    """

    def __init__(
        self,
        config: Config,
        store: CheckpointStore,
        replay: Replay,
        learner: Learner,
        lock: asyncio.Lock,
        recorder: Recorder,
        state: Callable[[], RunState],
    ) -> None:
        self._store, self._replay, self._learner = store, replay, learner
        self._lock = lock
        self._one_at_a_time = asyncio.Lock()
        self._recorder = recorder
        self._state = state
        self._num_steps = config.run.num_steps
        self._deadline_s = config.checkpoint.deadline_s
        self._path = config.run.dir / "export"
        self.saved_step, self.exported_step = 0, 0
        """Steps of the newest checkpoint and of the newest export in the current lineage; -1 if not known."""

    async def write(self, *, is_early: bool = False) -> None:
        """Write the checkpoint and the export of the current step, unless they exist.

        Args:
            is_early: the run ends, or may end, before its last step, so that an older export is enough.
        """
        async with self._one_at_a_time:
            step = self._state().step
            if self.saved_step < step:
                await self._checkpoint()
            if self.saved_step == step and self.exported_step < step and not (is_early and self._path.is_dir()):
                await self._export()

    async def export(self, path: Path) -> None:
        """Export to a folder beside `path`, then rename it.

        Raises:
            CheckpointError: the disk has no space for an export as large as the last one.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        check_room(path.parent, size_of(self._path) if self._path.is_dir() else 0, "an export", "make room")
        writing = path.with_name(path.name + ".writing")
        shutil.rmtree(writing, ignore_errors=True)
        async with self._lock:
            await self._learner.export(writing, self._deadline_s)
        replace_folder(writing, path)

    async def _checkpoint(self) -> None:
        with self._recorder.phase("learner", "checkpoint"):
            checkpoint = await self._if_there_is_room("checkpoint", self._write_checkpoint)
        if checkpoint is None:
            return
        self.saved_step = checkpoint.step
        self._recorder.checkpoint(checkpoint.step, checkpoint.version, checkpoint.path)
        oldest = await asyncio.to_thread(self._store.oldest_version)
        await self._replay.absorbed(checkpoint.version if oldest is None else oldest)

    async def _write_checkpoint(self) -> Checkpoint:
        self._store.check_space()
        async with self._lock:
            state = self._state()
            writing = self._store.begin(state.step)
            await self._replay.snapshot(writing / LEDGER)  # its entries survive whatever the checkpoint survives
            digests = await self._learner.save_checkpoint(writing, self._deadline_s)
            return await asyncio.to_thread(self._store.commit, writing, state.version, state.saved, digests)

    async def _export(self) -> None:
        async def write() -> bool:
            await self.export(self._path)
            return True

        with self._recorder.phase("learner", "export"):
            written = await self._if_there_is_room("export", write)
        if written:
            self.exported_step = self.saved_step

    def fell_back(self, saved_step: int, step: int, *, is_export_known: bool) -> None:
        """Continue from `step` after a fall-back to the checkpoint of `saved_step`.

        Args:
            saved_step: optimiser step of the checkpoint that was loaded; 0 if there was none.
            step: optimiser steps of the policy that the learner has now.
            is_export_known: False if an earlier process wrote the export, which may then be incomplete.
        """
        self.saved_step = saved_step
        self.exported_step = min(self.exported_step, step) if is_export_known else -1

    async def _if_there_is_room(self, part: str, write: Callable[[], Awaitable[T]]) -> T | None:
        give_up = asyncio.get_running_loop().time() + self._deadline_s
        while True:
            try:
                return await write()
            except CheckpointError as error:
                step = self._state().step
                self._recorder.event("failed", part, step=step, why=str(error))
                if step < self._num_steps:
                    return None
                if asyncio.get_running_loop().time() > give_up:
                    raise
                await asyncio.sleep(_TRY_AGAIN_S)
