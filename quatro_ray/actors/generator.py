"""A vLLM engine as a Ray actor."""

from __future__ import annotations

from typing import Any, Literal

import ray

from quatro_ray.actors.base import WATCHED, HostMixin, use_interface_of
from quatro_ray.actors.shared_memory import check_shared_memory, detach_resource_tracker
from quatro_ray.config import GeneratorConfig, LoraConfig
from quatro_ray.engines.generation import GenerationEngine
from quatro_ray.types import EngineLoad, GenerationSummary, Installed, Query, Rollout, RolloutGroup, SamplingParams


@ray.remote(concurrency_groups=WATCHED)
class GeneratorActor(HostMixin):
    """One engine, with all devices of its tensor-parallel group; the methods are those of GenerationEngine.

    Args:
        model_path: folder or hub name of the starting policy.
        device: "cpu" or "cuda".
        sync_backend: name of vLLM's weight transfer back end, "nccl", "ipc" or "gloo".
        seed: seed of the engine.
        sleeps: whether `sleep` will be called.
        adapter: the adapters that the engine loads; None if it gets whole weights.
    """

    def __init__(
        self,
        model_path: str,
        config: GeneratorConfig,
        *,
        device: Literal["cpu", "cuda"],
        sync_backend: str,
        seed: int,
        sleeps: bool = False,
        adapter: LoraConfig | None = None,
    ) -> None:
        detach_resource_tracker()
        self._num_devices = config.devices_per_engine
        use_interface_of(self.address())
        self._engine = GenerationEngine(
            model_path,
            config,
            device=device,
            sync_backend=sync_backend,
            seed=seed,
            sleeps=sleeps,
            adapter=adapter,
        )

    async def start(self) -> None:
        """Load the model; its weights are version 0.

        Raises:
            ConfigError: the node has too little shared memory.
        """
        if self._num_devices > 1:
            check_shared_memory("engines of several devices")
        await self._engine.start()

    @ray.method(num_returns=2)
    async def generate(
        self,
        group_id: int,
        query: Query,
        sampling: SamplingParams,
        group_size: int,
        begun: tuple[Rollout, ...] = (),
    ) -> tuple[GenerationSummary, RolloutGroup]:
        """Return a summary for the controller, and the group, which is passed on by reference."""
        group = await self._engine.generate(group_id, query, sampling, group_size, begun)
        return group.summary(), group

    async def complete(self, token_ids: list[int], sampling: SamplingParams, stop: list[str]) -> Rollout:
        """Sample one turn of an episode, which continues `token_ids`, and return the new tokens alone."""
        return await self._engine.complete(token_ids, sampling, stop)

    async def load(self) -> EngineLoad:
        """Return the engine's work at this moment."""
        return self._engine.load()

    async def pause(self) -> int:
        """Freeze running requests, and return how many groups and turns of episodes there are."""
        return await self._engine.pause()

    async def resume(self) -> None:
        """Continue the frozen requests under the present weights."""
        await self._engine.resume()

    async def sleep(self) -> None:
        """Free the device's memory; running requests are frozen."""
        await self._engine.sleep()

    async def wake_up(self) -> None:
        """Take the device's memory back, and continue the frozen requests."""
        await self._engine.wake_up()

    async def policy_version(self) -> int:
        """Return the version that the engine's own process reports."""
        return await self._engine.policy_version()

    async def score(self, sequences: list[list[int]]) -> list[list[float]]:
        """Return the log-prob of each token but the first, in nats at temperature 1."""
        return await self._engine.score(sequences)

    async def sampling_error(self, sequences: list[list[int]]) -> float:
        """Return the mean difference of sampled tokens' log-probs from their scores, nats at temperature 1."""
        return await self._engine.sampling_error(sequences)

    async def parameter_checksums(self) -> list[dict[str, str]]:
        """Return dtype, shape and checksum of each worker's parameters by name."""
        return await self._engine.parameter_checksums()

    async def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connect the engine's workers to the learner; the back end defines the fields of `init_info`."""
        await self._engine.init_weight_transfer_engine(init_info)

    async def start_weight_update(self) -> None:
        """Prepare the workers to receive a whole set of weights."""
        await self._engine.start_weight_update()

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive and load the tensors whose names, dtypes and shapes `update_info` lists."""
        await self._engine.update_weights(update_info)

    async def finish_weight_update(self, version: int) -> None:
        """Complete the update; the engine's weights are `version` from now on."""
        await self._engine.finish_weight_update(version)

    async def receive_weights(self) -> None:
        """Begin to receive a whole set of weights while generation continues; only with gloo."""
        await self._engine.receive_weights()

    async def receive_adapter(self, tensors: dict[str, Any]) -> None:
        """Keep the tensors of a new version of the adapter until `install_weights`."""
        self._engine.receive_adapter(tensors)

    async def install_weights(self, version: int) -> Installed:
        """Load the received weights; running requests are paused and continue under `version`."""
        return await self._engine.install_weights(version)

    async def weight_checksums(self) -> dict[str, str]:
        """Return the SHA-256 of every worker's parameters by name."""
        return await self._engine.weight_checksums()

    async def shutdown(self) -> None:
        """End the engine's processes."""
        await self._engine.shutdown()
