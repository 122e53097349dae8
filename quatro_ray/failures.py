"""Internal failures: what the parts of a run tell each other. Errors that a user meets are in errors.py.

EngineDied         raised by engines/generation.py; becomes EngineLost in actors/generator_client.py.
EngineLost         raised by actors/generator_client.py; actors/fleet.py starts a new engine, and
                   orchestrator/group_runner.py gives the group to another one, which continues from `begun`.
GenerationFailed   raised by evaluation/sampler.py; the group is tried again, then dropped for `reason`.
EnvironmentFailed  raised by environments/episode.py; becomes GenerationFailed in actors/environment_pool.py.
VerifierFailed     raised by actors/verifier_pool.py, retries included; the group is dropped for `reason`.
RewardUnavailable  raised by rewards; rewards/scorer.py records it as the outcome of the score.
LearnerLost        raised by actors/learner_group.py; the controller restarts the learner from a checkpoint, and
                   leased groups become ready again.
TransferFailed     raised by actors/learner_group.py; weight_sync/coordinator.py restarts the engines of the transfer.
"""

from __future__ import annotations

from quatro_ray.types import DropReason, Rollout


class EngineDied(Exception):
    """The engine's own process is gone, or failed for good; only a new one helps.

    `begun`: the rollouts of the group under way, as far as they came, for `generate` of another engine.
    """

    def __init__(self, message: str, begun: tuple[Rollout, ...] = ()) -> None:
        super().__init__(message, begun)
        self.begun = begun

    def __str__(self) -> str:
        return str(self.args[0])


class EngineLost(Exception):
    """The engine or its actor is gone; what it was doing is to be done by another.

    `core_died`: its actor lives, and tells of the other groups as well; `begun`: the rollouts of the group under way,
    as far as they came.
    """

    def __init__(self, message: str, begun: tuple[Rollout, ...] = (), *, core_died: bool = False) -> None:
        super().__init__(message)
        self.begun, self.core_died = begun, core_died


class GenerationFailed(Exception):
    """One try; after the last one the group is to be dropped for `reason`."""

    def __init__(self, reason: DropReason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


class EnvironmentFailed(Exception):
    """The machinery failed, not the policy; the group is to be generated again or dropped for `reason`."""

    def __init__(self, reason: DropReason, detail: str) -> None:
        super().__init__(reason, detail)  # both, for it travels between processes
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


class VerifierFailed(Exception):
    """The machinery failed, retries included; the group is to be dropped for `reason`."""

    def __init__(self, reason: DropReason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


class RewardUnavailable(Exception):
    """The machinery failed, not the answer: never a reward."""


class LearnerLost(Exception):
    """A rank died, failed or hung: all are to be started again from a checkpoint."""


class TransferFailed(Exception):
    """The learner lives; an engine died, or the connection failed."""
