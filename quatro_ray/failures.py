"""Internal failures, raised by one component and handled by another. Errors that a user sees are in errors.py.

EngineDied         raised by engines/generation.py; becomes EngineLost in actors/generator_client.py.
EngineLost         raised by actors/generator_client.py; actors/fleet.py starts a new engine, and
                   orchestrator/group_runner.py gives the group to another one, which continues from `begun`.
GenerationFailed   raised by actors/generation_retry.py; the group is tried again, then dropped for `reason`.
EnvironmentFailed  raised by environments/episode.py; becomes GenerationFailed in actors/environment_pool.py.
VerifierFailed     raised by actors/verifier_pool.py, retries included; the group is dropped for `reason`.
RewardUnavailable  raised by rewards; rewards/scorer.py records it as the outcome of the score.
NoVerdict          raised by rewards/workers.py, a RewardUnavailable whose group is dropped as no_verdict.
LearnerLost        raised by actors/learner_group.py; the controller restarts the learner from a checkpoint, and
                   leased groups become ready again.
TransferFailed     raised by actors/learner_group.py; weight_sync/coordinator.py restarts the engines of the transfer.
"""

from __future__ import annotations

from quatro_ray.types import DropReason, Rollout


class EngineDied(Exception):
    """The engine's own process is gone or failed for good, so the engine must be replaced.

    Attributes:
        begun: partial rollouts of the group, from which `generate` of another engine continues.
    """

    def __init__(self, message: str, begun: tuple[Rollout, ...] = ()) -> None:
        super().__init__(message, begun)
        self.begun = begun

    def __str__(self) -> str:
        return str(self.args[0])


class EngineLost(Exception):
    """The engine or its actor is gone; another engine must take over its groups.

    Attributes:
        begun: partial rollouts of the group, from which another engine continues.
        core_died: the actor is alive and reports each of its groups; only the engine's process died.
    """

    def __init__(self, message: str, begun: tuple[Rollout, ...] = (), *, core_died: bool = False) -> None:
        super().__init__(message)
        self.begun, self.core_died = begun, core_died


class GenerationFailed(Exception):
    """One attempt to generate a group failed; after the last attempt the group is dropped for `reason`."""

    def __init__(self, reason: DropReason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


class EnvironmentFailed(Exception):
    """The environment failed, not the policy; the group is generated again or dropped for `reason`."""

    def __init__(self, reason: DropReason, detail: str) -> None:
        super().__init__(reason, detail)  # both, because unpickling in another process calls __init__ with them
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


class VerifierFailed(Exception):
    """The verifier failed, retries included; the group is dropped for `reason`."""

    def __init__(self, reason: DropReason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


class RewardUnavailable(Exception):
    """The verifier failed, not the answer, so the rollout gets no reward."""


class NoVerdict(RewardUnavailable):
    """The user's function returned None: it cannot tell, so the group is scored again, then dropped as no_verdict."""


class LearnerLost(Exception):
    """A learner rank died, failed or hung; all ranks must be restarted from a checkpoint."""


class TransferFailed(Exception):
    """A weight transfer failed although the learner is alive: an engine died, or the connection broke."""
