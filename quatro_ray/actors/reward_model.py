"""A reward model as a Ray actor."""

from __future__ import annotations

import ray

from quatro_ray.actors.base import WATCHED, HostMixin, use_interface_of
from quatro_ray.actors.shared_memory import detach_resource_tracker
from quatro_ray.config import ModelRewardConfig
from quatro_ray.engines.reward_model import RewardModelEngine


@ray.remote(concurrency_groups=WATCHED)
class RewardModelActor(HostMixin):
    """One engine, with RewardModelEngine's methods. Calls run concurrently: spawn it with high max_concurrency."""

    def __init__(self, config: ModelRewardConfig, *, device: str) -> None:
        detach_resource_tracker()
        use_interface_of(self.address())
        self._engine = RewardModelEngine(config, device=device)  # type: ignore[arg-type]

    async def start(self) -> None:
        """Load the model."""
        await self._engine.start()

    async def score(self, prompt: str, response: str) -> float:
        """Return the model's logit for a response to the prompt: unbounded, and higher is better."""
        return await self._engine.score(prompt, response)

    async def shutdown(self) -> None:
        """End the engine's processes."""
        await self._engine.shutdown()
