"""What a run leaves on the disk while it goes on: checkpoints, and the policy as users load it."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from quatro_ray.config import Config
from quatro_ray.engines.checkpoint_store import Checkpoint, CheckpointStore, check_room, replace_folder, size_of
from quatro_ray.errors import CheckpointError
from quatro_ray.telemetry.recorder import Recorder

T = TypeVar("T")
_TRY_AGAIN_S = 10.0


class CheckpointWriter:
    """Saving does not stop generation. What finds no room is told and left out; the last of a run waits for room.

    Args:
        replay, learner: the controller's parts; `lock`: held while the learner is used.
        now: step, version and what else a checkpoint is to hold; asked with the lock held.
    """

    def __init__(
        self,
        config: Config,
        store: CheckpointStore,
        replay: Any,
        learner: Any,
        lock: asyncio.Lock,
        recorder: Recorder,
        now: Callable[[], tuple[int, int, dict[str, Any]]],
    ) -> None:
        self._store, self._replay, self._learner = store, replay, learner
        self._lock = lock
        self._recorder = recorder
        self._now = now
        self._num_steps = config.run.num_steps
        self._deadline_s = config.checkpoint.deadline_s
        self._path = config.run.dir / "export"
        self.saved, self.exported = 0, 0
        """Steps of the newest checkpoint and of the newest export, on the line that goes on."""

    async def keep(self, *, is_early: bool = False) -> None:
        """A checkpoint, and what belongs to it: each where it is not there yet.

        Args:
            is_early: the run ends before its time, so that an older export will do.
        """
        step = self._now()[0]
        if self.saved < step:
            await self._checkpoint()
        if self.saved == step and self.exported < step and not (is_early and self._path.is_dir()):
            await self._export()

    async def export(self, path: Path) -> None:
        """Written beside, then renamed. Raises CheckpointError where there is no room for one as large as the last."""
        path.parent.mkdir(parents=True, exist_ok=True)
        check_room(path.parent, size_of(self._path) if self._path.is_dir() else 0, "an export", "make room")
        writing = path.with_name(path.name + ".writing")
        shutil.rmtree(writing, ignore_errors=True)
        async with self._lock:
            await self._learner.export(writing, self._deadline_s)
        replace_folder(writing, path)

    async def _checkpoint(self) -> None:
        with self._recorder.phase("learner", "checkpoint"):
            checkpoint = await self._if_there_is_room("checkpoint", self._write)
        if checkpoint is None:
            return
        self.saved = checkpoint.step
        told = {"step": checkpoint.step, "version": checkpoint.version, "path": checkpoint.path.name}
        self._recorder.event("written", "checkpoint", **told)
        oldest = await asyncio.to_thread(self._store.oldest_version)
        await self._replay.absorbed(checkpoint.version if oldest is None else oldest)

    async def _write(self) -> Checkpoint:
        self._store.check_space()
        async with self._lock:
            step, version, state = self._now()
            await self._replay.flush()  # what the ledger has of this version is there if the checkpoint is
            writing = self._store.begin(step)
            digests = await self._learner.save_checkpoint(writing, self._deadline_s)
            return await asyncio.to_thread(self._store.commit, writing, version, state, digests)

    async def _export(self) -> None:
        """As `run.dir`/export."""

        async def write() -> bool:
            await self.export(self._path)
            return True

        with self._recorder.phase("learner", "export"):
            written = await self._if_there_is_room("export", write)
        if written:
            self.exported = self.saved

    async def _if_there_is_room(self, part: str, write: Callable[[], Awaitable[T]]) -> T | None:
        give_up = asyncio.get_running_loop().time() + self._deadline_s
        while True:
            try:
                return await write()
            except CheckpointError as error:
                step = self._now()[0]
                self._recorder.event("failed", part, step=step, why=str(error))
                if step < self._num_steps:
                    return None
                if asyncio.get_running_loop().time() > give_up:
                    raise
                await asyncio.sleep(_TRY_AGAIN_S)
