"""Sends responses to worker processes and returns the values of their rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from quatro_ray.config import PythonRewardConfig, RewardConfig, VerifierConfig
from quatro_ray.errors import ConfigError
from quatro_ray.failures import NoVerdict, RewardUnavailable
from quatro_ray.isolation.bubblewrap import in_the_sandbox
from quatro_ray.isolation.worker_pool import Exhausted, ProcessPool, WorkerLost, in_the_open
from quatro_ray.rewards.reasoning_gym import SANDBOX_VARIABLE
from quatro_ray.types import Query, Response

_PROGRAM = "quatro_ray.rewards.worker"


@dataclass(frozen=True)
class LocalScore:
    """The scores of one response by its local rewards.

    Attributes:
        values: value by the reward's name; None if the response exceeded its limits twice.
        detail: how it exceeded them.
        unreadable: which scorers raised on the answer, and what; empty if none did.
        printed: what the rewards printed.
    """

    values: Mapping[str, float] | None
    detail: str = ""
    unreadable: str = ""
    printed: str = ""


class RewardProcesses:
    """A pool of `verifier.num_workers` processes, each of which scores one response at a time.

    Args:
        rewards: by name.
        sandboxed: run the processes inside the sandbox, because some of `rewards` execute responses.
    """

    def __init__(self, config: VerifierConfig, rewards: Mapping[str, RewardConfig], *, sandboxed: bool = False) -> None:
        self._config = config
        self._functions = {name for name, reward in rewards.items() if isinstance(reward, PythonRewardConfig)}
        self._pool = ProcessPool(
            in_the_sandbox(_PROGRAM, config.memory_mib, env={SANDBOX_VARIABLE: "1"})
            if sandboxed
            else in_the_open(_PROGRAM, config.pass_env),
            {"rewards": {name: reward.model_dump(mode="json") for name, reward in rewards.items()}},
            num_workers=config.num_workers,
            memory_mib=config.memory_mib,
            start_deadline_s=config.start_deadline_s,
            recycle_after=config.recycle_after,
        )

    @property
    def num_replaced(self) -> int:
        """Number of processes that were lost while they scored a response; recycled ones do not count."""
        return self._pool.num_replaced

    async def start(self) -> None:
        """Start all processes.

        Raises:
            ConfigError: the rewards cannot be made.
            RewardUnavailable: no process starts.
        """
        try:
            await self._pool.start(self._config.num_workers)
        except ConfigError as error:
            raise ConfigError(f"rewards: {error}") from error
        except WorkerLost as lost:
            raise RewardUnavailable(str(lost)) from lost

    async def close(self) -> None:
        """End all processes."""
        await self._pool.close()

    async def score(self, query: Query, response: Response, names: Sequence[str]) -> LocalScore:
        """Wait for a free process and return the values of the rewards `names`.

        Once a process is free, this takes at most two deadlines and one start of a process.

        Raises:
            NoVerdict: a user's function returned None.
            RewardUnavailable: a reward failed, a user's function ended its process twice, or a process was lost
                through no fault of the response.
        """
        request = {"query": asdict(query), "response": asdict(response), "names": list(names)}
        try:
            answer = await self._pool.use(lambda worker: worker.ask(request, self._config.deadline_s))
        except Exhausted as exhausted:
            if exhausted.ended_itself and (functions := [name for name in names if name in self._functions]):
                raise RewardUnavailable(
                    f"{exhausted}; a function ({', '.join(functions)}) must not end its process"
                ) from exhausted
            return LocalScore(None, str(exhausted))
        except WorkerLost as lost:
            raise RewardUnavailable(str(lost)) from lost
        if "error" in answer:
            raise RewardUnavailable(answer["error"])
        if names_without := answer["no_verdict"]:
            raise NoVerdict(f"rewards.{names_without[0]} returned None, which is no verdict, for {query.query_id}")
        return LocalScore(answer["values"], unreadable=answer["unreadable"], printed=answer["printed"])
