"""One ZeRO-3 rank as a Ray actor."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray
from numpy.typing import NDArray

from quatro_ray.actors.base import WATCH, WATCHED, HostMixin, use_interface_of
from quatro_ray.actors.shared_memory import check_shared_memory
from quatro_ray.config import WeightSyncConfig
from quatro_ray.engines.checkpoint_store import Digests, digest_files
from quatro_ray.engines.learner_spec import LearnerSpec
from quatro_ray.replay.buffer import LeasedBatch
from quatro_ray.replay.packing import pack
from quatro_ray.replay.staleness import Lineage
from quatro_ray.types import LearnerBatch, RolloutGroup, StepMetrics
from quatro_ray.weight_sync.agreement import Scored
from quatro_ray.weight_sync.sender import WeightSender

_logger = logging.getLogger(__name__)
_WIDTH_MULTIPLE_ON_GPUS = 128
"""Tokens; what matrix products on GPUs are tiled by."""


@ray.remote(concurrency_groups=WATCHED)
class LearnerActor(HostMixin):
    """One ZeRO-3 rank. Every method in the default concurrency group is a collective: call it on all ranks."""

    def __init__(self, spec: LearnerSpec, rank: int) -> None:
        # imported here, because the process that spawns the actor needs neither torch nor DeepSpeed
        from quatro_ray.engines.learning import LearningEngine

        use_interface_of(self.address())
        self._rank = rank
        self._config, self._device = spec.config, spec.device
        self._engine = LearningEngine(spec, rank=rank)
        self._sender: WeightSender | None = None

    def start(self, master_address: str, master_port: int) -> None:
        """Join the process group, whose store rank 0 opens at this address and port, and load the starting policy.

        Raises:
            ConfigError: the node has too little shared memory.
        """
        if self._device == "cuda" and self._config.num_ranks > 1:
            check_shared_memory("learner ranks on GPUs")
        _logger.info("rank %d: starting; rank 0 is at %s:%d", self._rank, master_address, master_port)
        self._engine.start(master_address, master_port)
        self._sender = WeightSender(
            self._rank,
            self._engine.sent_weights,
            submit=lambda actor, method, *args: getattr(actor, method).remote(*args),
            wait=lambda futures, seconds: ray.get(futures, timeout=seconds),
        )
        _logger.info("rank %d: started", self._rank)

    def train_step(self, leased: LeasedBatch, version: int) -> StepMetrics:
        """Train one step on this rank's share of the batch.

        Args:
            leased: the whole batch, the same on all ranks.
            version: the version that the step trains from.

        Raises:
            RuntimeError: this rank does not hold `version`.
        """
        return self._engine.train_step(self._pack(leased.groups, leased.lineage), version)

    def logprobs(self, groups: tuple[RolloutGroup, ...]) -> list[NDArray[np.float32]]:
        """Return the log-probs of the targets, float32 [N] in nats for each micro-batch of this rank."""
        return self._engine.logprobs(self._pack(groups, Lineage.unbroken(self._engine.version)))

    def score_fixed(self, max_tokens: int) -> list[Scored]:
        """Return fixed sequences of at most `max_tokens` tokens with this rank's log-probs; a collective."""
        return self._engine.score_fixed(max_tokens)

    def parameter_checksums(self, dtypes: dict[str, str]) -> dict[str, str]:
        """Return dtype, shape and checksum of the weights, cast to these dtypes, by name; on rank 0 only."""
        return self._engine.parameter_checksums(dtypes)

    def _pack(self, groups: tuple[RolloutGroup, ...], lineage: Lineage) -> LearnerBatch:
        tokens = self._config.tokens_per_micro_batch
        return pack(
            groups,
            lineage,
            num_ranks=self._config.num_ranks // self._config.sequence_parallel_size,
            tokens_per_micro_batch=tokens,
            rank=self._engine.row_rank,
            row_layout=self._engine.row_layout,
            num_minibatches=self._config.num_minibatches,
            width_multiple=_WIDTH_MULTIPLE_ON_GPUS if self._device == "cuda" else 1,
        )

    @property
    def _started_sender(self) -> WeightSender:
        assert self._sender is not None, "start() must be called first"
        return self._sender

    def open_weight_transfer(
        self,
        backend: Literal["nccl", "ipc", "gloo", "adapter"],
        generators: list[Any],
        workers_per_engine: int,
        master_address: str,
        master_port: int,
        config: WeightSyncConfig,
    ) -> None:
        """Connect to the workers of all engines, given by their actor handles; replaces an earlier connection.

        The arguments are those of WeightSender.open.
        """
        self._started_sender.open(backend, generators, workers_per_engine, master_address, master_port, config)

    def send_weights(self, version: int) -> None:
        """Send the weights to the connected engines. With gloo they still have to load them.

        If the connection fails, this rank still takes part in all gathers, so that the ranks stay in step.

        Raises:
            RuntimeError: this rank does not hold `version`.
        """
        if version != self._engine.version:
            raise RuntimeError(f"rank {self._rank} holds version {self._engine.version}, not {version}")
        self._started_sender.send(version)

    @ray.method(concurrency_group=WATCH)
    def close_weight_transfer(self, why: str) -> None:
        """End the connection to the engines, also while this rank is stuck in it; no collective."""
        if self._sender is not None:
            self._sender.close(why)

    def save_checkpoint(self, folder: Path) -> Digests:
        """Write this rank's shard, and return the digests of its equal share of all files."""
        self._engine.save_checkpoint(folder)
        _logger.info("rank %d: checkpoint written to %s", self._rank, folder)
        return digest_files(folder, self._rank, self._config.num_ranks)

    def load_checkpoint(self, folder: Path, version: int) -> None:
        """Load a checkpoint; its policy has the number `version` from now on."""
        _logger.info("rank %d: loading checkpoint %s as version %d", self._rank, folder, version)
        self._engine.load_checkpoint(folder, version)

    def set_version(self, version: int) -> None:
        """Give the present weights the number `version`."""
        self._engine.version = version

    def export(self, path: Path) -> None:
        """Write the weights in Hugging Face format."""
        self._engine.export(path)
