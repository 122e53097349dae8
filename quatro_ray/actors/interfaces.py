"""Protocols of the components that the controller and evaluation drive.

On a cluster the clients and pools of this package implement them; in tests plain objects do. Groups are passed by
reference from actor to actor, and only their summaries are awaited.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Protocol

from quatro_ray.engines.checkpoint_store import Digests
from quatro_ray.replay.buffer import FallBack, LeaseSummary, RecoveredState, ReplayStats
from quatro_ray.telemetry.activity import Activity
from quatro_ray.types import (
    DropReason,
    EngineLoad,
    GenerationSummary,
    GroupSummary,
    Installed,
    Query,
    Rollout,
    SamplingParams,
    StepMetrics,
)

GroupRef = object
"""A RolloutGroup, or a Ray object reference to one."""
LeasedRef = object
"""A LeasedBatch of replay/buffer.py, or a Ray object reference to one."""


class Engine(Protocol):
    """One engine (actors/generator_client.py).

    Every coroutine raises EngineLost if the engine's actor died, or if the engine's own process died and the call needs
    it. Any other exception means that the call failed and the engine may still run.
    """

    async def start(self) -> None:
        """Load the starting policy, as version 0; after any exception the engine cannot be used."""
        ...

    async def generate(
        self, group_id: int, query: Query, sampling: SamplingParams, group_size: int, begun: tuple[Rollout, ...] = ()
    ) -> tuple[GenerationSummary, GroupRef]:
        """Generate a group, and return its summary and a reference to it. The caller enforces the group's deadline.

        Args:
            group_id: id that the returned group carries; it has no effect on the tokens.
            query: if its data source has an environment, the rollouts are episodes of it.
            sampling: `max_tokens` bounds each response, or each whole episode; each rollout derives its own seed from
                `seed`.
            group_size: number of rollouts, G.
            begun: rollouts [G] that a lost engine reported; the group continues from their tokens. Empty to start
                anew. Episodes ignore them and start again.

        Raises:
            EngineLost: the engine died. If its actor survived, `begun` has the tokens sampled so far, except for
                episodes.
            GenerationFailed: the environment failed, not the engine.
        """
        ...

    async def load(self) -> EngineLoad:
        """Return the engine's work at this moment; `is_alive` is False if the engine's own process died."""
        ...

    async def pause(self) -> int:
        """Freeze running requests, which keep their tokens; return the number of groups and turns of episodes."""
        ...

    async def resume(self) -> None:
        """Continue the frozen requests under the present weights."""
        ...

    async def sleep(self) -> None:
        """Free the device's memory; running requests are frozen, and computed again after `wake_up`."""
        ...

    async def wake_up(self) -> None:
        """Take the device's memory back, and continue the frozen requests under the weights of before."""
        ...

    async def receive_weights(self) -> None:
        """Begin to receive weights in the background; called before the learner sends, if the back end is gloo."""
        ...

    async def install_weights(self, version: int) -> Installed:
        """Load the received weights; running requests are paused meanwhile and continue under `version`.

        After an exception the engine may hold a part of the weights.
        """
        ...

    async def policy_version(self) -> int:
        """Return the version of the weights, as the engine's own process reports it."""
        ...

    async def score(self, sequences: list[list[int]]) -> list[list[float]]:
        """Return the log-prob of each token but the first, given those before it, in nats at temperature 1."""
        ...

    async def sampling_error(self, sequences: list[list[int]]) -> float:
        """Return the mean difference of sampled tokens' log-probs from their scores, nats at temperature 1."""
        ...

    async def parameter_checksums(self) -> list[dict[str, str]]:
        """Return dtype, shape and checksum of each worker's parameters by name (weight_sync/checksums.py)."""
        ...

    async def stacks(self) -> str:
        """Return the stack of every thread of the actor's process, even while the actor is busy."""
        ...

    def kill(self) -> None:
        """Kill the actor; the engine's own processes die with it."""
        ...


class Generators(Protocol):
    """Engines that share the work: the fleet of training, or the engines of one evaluation."""

    def lend(self) -> AbstractAsyncContextManager[Engine]:
        """Lend the engine with the fewest groups."""
        ...


class Verifiers(Protocol):
    """Scores groups (actors/verifier_pool.py)."""

    num_replaced: int
    activity: Activity

    async def score(self, group: GroupRef) -> tuple[GroupSummary, ScoredGroup]:
        """Return the summary of the scores and the scored group, or raise VerifierFailed after the last retry."""
        ...


class ScoredGroup(Protocol):
    """A reference to a scored group, which may be awaited."""

    def __await__(self) -> Any: ...


class Replay(Protocol):
    """The replay buffer (actors/replay_client.py); the methods are those of replay/buffer.py:ReplayBuffer.

    A call that is repeated changes nothing. Every call raises StallError if the buffer does not answer before its
    deadline, retries included, and LedgerError if the life cycle of a group (types.py:GroupState) does not allow the
    change.
    """

    async def recover(self) -> RecoveredState:
        """Return the ledger's state, after a controller or the learner was lost.

        Ready groups whose stored rollouts cannot be read become pending.
        """
        ...

    async def pending(self) -> list[tuple[int, Query]]:
        """Return ids and queries of the pending groups, oldest first."""
        ...

    async def capacity(self, version: int, num_idle: int = 0) -> int:
        """Return how many groups may be started now, at least 0 and at most as many as the run can still train.

        Args:
            version: the policy version of the engines.
            num_idle: pending groups that no task works on. They count as free places, because they are started first.
        """
        ...

    async def admit(self, first_id: int, queries: list[Query], version: int) -> list[int]:
        """Admit queries as pending groups with consecutive ids, and return the ids.

        Args:
            first_id: id of the first group. A group that exists already is not changed.
            queries: one for each group.
            version: the policy version of the engines.

        Raises:
            LedgerError: the queries exceed the capacity; none is admitted.
        """
        ...

    async def ready(self, group: GroupRef) -> None:
        """Store a scored group, which may be leased from now on.

        Raises:
            LedgerError: the learner has abandoned the version of a token, so the group cannot be trained on.
            ValueError: a rollout has no score.
        """
        ...

    async def drop(self, group_id: int, reason: DropReason) -> None:
        """Drop a group for good; it is counted under its reason."""
        ...

    async def lease(self, version: int, num_samples: int = 0) -> tuple[LeaseSummary | None, LeasedRef]:
        """Lease the `replay.groups_per_step` ready groups with the oldest tokens, after dropping expired ones.

        Args:
            version: the learner's version, from which the step trains. A batch that is leased to it already is returned
                again.
            num_samples: number of groups that the summary holds in readable form.

        Returns:
            A summary, and a reference to the batch for the learner. While too few groups are ready, the summary is None
            and the reference must not be used.
        """
        ...

    async def commit(self, version: int) -> int:
        """Record that the batch leased from `version` is trained, and return the version of the resulting policy.

        Raises:
            LedgerError: no batch is leased from `version`.
        """
        ...

    async def fall_back(self, version: int, known: int) -> FallBack:
        """Continue from the weights of an earlier version under a new version number.

        Groups that are leased or were trained since become ready again if their rollouts are stored and all their
        tokens belong to the lineage that continues. The others, and ready groups with tokens of abandoned versions,
        become pending.

        Args:
            version: the version of the checkpoint; 0 for the starting policy.
            known: the newest version that the caller knows of. If a newer one exists, the call is a repetition.
        """
        ...

    async def snapshot(self, path: Path) -> None:
        """Write all changes to the disk, so that they survive a crash of the machine, and a copy of the database.

        Args:
            path: the file of the copy, which belongs to a checkpoint and holds no rollouts.
        """
        ...

    async def absorbed(self, version: int) -> int:
        """Free the rollouts of groups that the oldest checkpoint has absorbed, and return the number of these groups.

        Args:
            version: version of the oldest checkpoint that is kept; groups trained before it are freed.
        """
        ...

    async def end_run(self) -> None:
        """Drop all groups that are neither trained nor dropped, with the reason `run_ended`."""
        ...

    async def stats(self) -> ReplayStats:
        """Return the number of groups by state and by reason of drop."""
        ...


class Learner(Protocol):
    """The ranks of the learner (actors/learner_group.py).

    If a rank died, failed or missed the deadline, all ranks are killed, the call raises LearnerLost, and `restart`
    must be called. `open_transfer` and `send_weights` raise TransferFailed instead if all ranks are alive. A
    QuatroError of a rank is raised unchanged.
    """

    async def train_step(self, leased: LeasedRef, version: int) -> StepMetrics:
        """Train one optimiser step, and return its metrics.

        If a loss or gradient is not finite, the weights stay as they are and `step/skipped` is 1; the learner's version
        grows by one all the same.

        Args:
            leased: the batch, the second value that `Replay.lease` returned.
            version: the version that the step trains from, which must be the learner's.
        """
        ...

    async def open_transfer(self, engines: Sequence[Any]) -> None:
        """Connect to exactly these engines; replaces an earlier connection.

        Args:
            engines: clients of the engines (actors/generator_client.py).

        Raises:
            TransferFailed: the connection failed, and the ranks live.
        """
        ...

    async def send_weights(self, version: int) -> None:
        """Send the weights to the connected engines, which then hold `version`.

        Args:
            version: the learner's version.

        Raises:
            TransferFailed: the transfer failed, and the ranks live.
        """
        ...

    async def save_checkpoint(self, folder: Path, deadline_s: float) -> Digests:
        """Write a checkpoint, and return size and SHA-256 of its files by name.

        Args:
            folder: new or empty, and visible to every rank.
            deadline_s: limit for all ranks together, in seconds.
        """
        ...

    async def load_checkpoint(self, folder: Path, version: int) -> None:
        """Restore weights and optimiser from a checkpoint, which another number of ranks may have written.

        Args:
            folder: the checkpoint, visible to every rank.
            version: number of the restored policy from now on; a new one, because a number never means two policies.

        Raises:
            CheckpointError: the checkpoint is missing, incomplete, or of another model or dtype.
        """
        ...

    async def set_version(self, version: int) -> None:
        """Give the present weights the number `version`."""
        ...

    async def export(self, path: Path, deadline_s: float) -> None:
        """Write weights, configuration and tokenizer in Hugging Face format.

        Args:
            path: folder, which is created if it does not exist; rank 0 writes all files.
            deadline_s: limit for all ranks together, in seconds.
        """
        ...

    async def restart(self) -> None:
        """Replace all ranks by new ones, which have the starting policy as version 0."""
        ...

    async def watch(self, liveness_deadline_s: float) -> str:
        """Wait until a rank dies or gives no sign of life, kill all ranks, and return the reason.

        Args:
            liveness_deadline_s: after this many seconds without an answer, a rank counts as dead.
        """
        ...

    async def stacks(self) -> list[str]:
        """Return the stacks of all threads, for each rank; an exception means that a rank is gone."""
        ...
