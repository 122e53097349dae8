"""The `verifier` section: the pool of processes that score rollouts."""

from __future__ import annotations

from pydantic import Field

from quatro_ray.config.base import EnvironmentNames, Section
from quatro_ray.config.rewards import MAX_ABS_REWARD


class VerifierConfig(Section):
    """The pool that scores rollouts: actors that own worker processes, which are killed if they miss a deadline."""

    num_actors: int = Field(1, ge=1)
    """Verifier actors, which Ray spreads over the nodes. Raise it to score on several nodes."""
    num_workers: int = Field(2, ge=1)
    """Worker processes of each actor. Raise it if generated groups wait to be scored."""
    deadline_s: float = Field(10, gt=0)
    """Seconds to score one response; one that exceeds them is scored again, alone in a fresh process."""
    group_deadline_s: float = Field(300, gt=0)
    """Seconds to score a whole group, including the wait for a free worker; an actor that exceeds them is replaced."""
    start_deadline_s: float = Field(120, gt=0)
    """Seconds within which a new actor or process must run; they do not count towards the scoring deadlines."""
    memory_mib: int = Field(2048, ge=256)
    """Address space of a worker process, MiB."""
    recycle_after: int = Field(2000, ge=1)
    """Responses that a worker scores before it is replaced, which bounds memory leaks of reward functions."""
    pass_env: EnvironmentNames = ()
    """Names of environment variables that reward functions may read, besides PATH, HOME and the like; each must be set
    on the machines of the verifier."""
    max_retries: int = Field(1, ge=0)
    """Retries of a group after the machinery failed; after the last one the group is dropped with that reason."""
    exhausted_reward: float = Field(0.0, ge=-MAX_ABS_REWARD, le=MAX_ABS_REWARD)
    """Score of a response that exceeded its limits twice."""
