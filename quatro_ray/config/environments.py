"""The `environments` section: episodes of several turns."""

from __future__ import annotations

from pydantic import Field, JsonValue

from quatro_ray.config.base import EnvironmentNames, Section
from quatro_ray.config.paths import FunctionPath


class EnvironmentConfig(Section):
    """A user's function that talks to the policy; each episode has its own process (docs/environments.md)."""

    function: FunctionPath
    """The function (query: Query, policy: Policy) -> None, a number, or numbers by name."""
    params: dict[str, JsonValue] = Field({})
    """Further arguments of the function, by name."""
    max_turns: int = Field(8, ge=1)
    """Turns of the policy per episode; after the last one `policy.generate` returns None."""
    turn_deadline_s: float = Field(30, gt=0)
    """Seconds that the environment itself may take between two turns. An episode that exceeds them is played again in
    a fresh process; the second time it ends with outcome `exhausted`."""
    episode_deadline_s: float = Field(300, gt=0)
    """Seconds for a whole episode, including generation and excluding the wait for a process. If exceeded, the group
    is generated again."""
    start_deadline_s: float = Field(120, gt=0)
    """Seconds within which a process must start and import the function."""
    num_actors: int = Field(1, ge=1)
    """Environment actors, which Ray spreads over the nodes."""
    num_workers: int = Field(16, ge=1)
    """Processes of each actor, and so the episodes that it plays at the same time."""
    memory_mib: int = Field(1024, ge=256)
    """Address space of a process, MiB."""
    recycle_after: int = Field(1000, ge=1)
    """Episodes that a process plays before it is replaced."""
    pass_env: EnvironmentNames = ()
    """Names of environment variables that the function may read, besides PATH, HOME and the like; each must be set on
    the machines of its actors. In the sandbox there are none."""
    sandbox: bool = False
    """Run the processes in the sandbox of the code reward. Needed for functions that execute the policy's text."""
