"""Episodes of several turns."""

from __future__ import annotations

from pydantic import Field, JsonValue

from quatro_ray.config.base import FunctionPath, Section


class EnvironmentConfig(Section):
    """A function of yours that talks to the policy; each episode has a process of its own (docs/environments.md)."""

    function: FunctionPath
    """`module:name`, or `path/to/file.py:name`: (query: Query, policy: Policy) -> None, a number or numbers by name."""
    params: dict[str, JsonValue] = Field({})
    """Further arguments by name."""
    max_turns: int = Field(8, ge=1)
    """Turns of the policy; after the last one `policy.generate` returns None."""
    turn_deadline_s: float = Field(30, gt=0)
    """For what the environment itself does between two turns. Missed twice, the second time in a fresh process: the
    episode is over, outcome `exhausted`."""
    episode_deadline_s: float = Field(300, gt=0)
    """For a whole episode, generation included, waiting for a process not; missed: the group is generated again."""
    start_deadline_s: float = Field(120, gt=0)
    """For a process to start and import the function."""
    num_actors: int = Field(1, ge=1)
    """Spread over the nodes by Ray."""
    num_workers: int = Field(16, ge=1)
    """Processes of each actor: so many episodes at the same time."""
    memory_mib: int = Field(1024, ge=256)
    """Address space of a process."""
    recycle_after: int = Field(1000, ge=1)
    """Episodes of a process before it is replaced."""
    sandbox: bool = False
    """Run the processes in the sandbox of the code reward: for functions that execute what the policy wrote."""
