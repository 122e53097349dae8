"""One ZeRO-3 rank as a Ray actor."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import ray

from quatro_ray.actors.base import WATCHED, HostMixin, interface_of
from quatro_ray.config import LearnerConfig, ObjectiveConfig, WeightSyncConfig
from quatro_ray.engines.checkpoint_store import Digests, digest_files
from quatro_ray.replay.packing import pack
from quatro_ray.replay.staleness import Lineage
from quatro_ray.types import RolloutGroup
from quatro_ray.weight_sync.engine_client import EngineClient


@ray.remote(concurrency_groups=WATCHED)
class LearnerActor(HostMixin):
    """Every method but those about the host is a collective: call it on all ranks."""

    def __init__(
        self,
        model_path: str,
        config: LearnerConfig,
        objective: ObjectiveConfig,
        *,
        rank: int,
        device: str,
        temperature: float,
        max_response_tokens: int,
        seed: int,
        num_steps: int,
    ) -> None:
        # here, not above: who only spawns the actor needs neither torch nor DeepSpeed
        from quatro_ray.engines.learning import LearningEngine

        if interface := interface_of(self.address()):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        self._rank = rank
        self._config = config
        self._engine = LearningEngine(
            model_path,
            config,
            objective,
            rank=rank,
            device=device,  # type: ignore[arg-type]
            temperature=temperature,
            max_response_tokens=max_response_tokens,
            seed=seed,
            num_steps=num_steps,
        )

    def start(self, master_address: str, master_port: int) -> None:
        self._engine.start(master_address, master_port)

    def train_step(self, leased: tuple[tuple[RolloutGroup, ...], Lineage], version: int) -> dict[str, Any]:
        """Each rank packs the same plan from the same groups and trains its own part of it."""
        return self._engine.train_step(self._pack(*leased), version)

    def logprobs(self, groups: tuple[RolloutGroup, ...]) -> list[np.ndarray]:
        return self._engine.logprobs(self._pack(groups, Lineage.unbroken(self._engine.version)))

    def _pack(self, groups: tuple[RolloutGroup, ...], lineage: Lineage) -> Any:
        tokens = self._config.tokens_per_micro_batch
        return pack(groups, lineage, num_ranks=self._config.num_ranks, tokens_per_micro_batch=tokens)

    def open_weight_transfer(
        self,
        backend: str,
        generators: list[Any],
        workers_per_engine: int,
        master_address: str,
        master_port: int,
        config: WeightSyncConfig,
    ) -> None:
        from quatro_ray.weight_sync.sender import open_transfer

        self._client = EngineClient(
            generators,
            submit=lambda actor, method, *args: getattr(actor, method).remote(*args),
            wait=lambda futures, seconds: ray.get(futures, timeout=seconds),
            workers_per_engine=workers_per_engine,
            rendezvous_deadline_s=config.rendezvous_deadline_s,
            transfer_deadline_s=config.transfer_deadline_s,
        )
        self._transfer = open_transfer(
            backend,  # type: ignore[arg-type]
            rank=self._rank,
            master_address=master_address,
            master_port=master_port,
            num_workers=len(generators) * workers_per_engine,
            deadline_s=config.rendezvous_deadline_s,
            client=self._client,
            source=self._engine.weights,
        )

    def send_weights(self, version: int) -> None:
        """Whatever fails between this rank and the engines, it takes part in all gathers, so that ranks stay in step.

        Raises:
            RuntimeError: this rank does not hold the version it is to send.
        """
        if version != self._engine.version:
            raise RuntimeError(f"rank {self._rank} holds version {self._engine.version}, not {version}")
        self._client.version = version
        with self._engine.weights.whole_pass():
            self._transfer.send_weights()

    def save_checkpoint(self, folder: Path) -> Digests:
        """Returns the digests of this rank's share of the files; shares are of equal size."""
        self._engine.save_checkpoint(folder)
        return digest_files(folder, self._rank, self._config.num_ranks)

    def load_checkpoint(self, folder: Path, version: int) -> None:
        self._engine.load_checkpoint(folder, version)

    def set_version(self, version: int) -> None:
        self._engine.version = version

    def export(self, path: Path) -> None:
        self._engine.export(path)
