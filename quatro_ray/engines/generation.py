"""A vLLM engine that samples whole groups, with behaviour log-probs and the policy version of every token."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from quatro_ray.config import GeneratorConfig, LoraConfig
from quatro_ray.data.chat_template import encode_prompt, prompt_tail
from quatro_ray.engines.engine_adapter import EngineAdapter
from quatro_ray.engines.engine_args import cpu_args, gpu_args
from quatro_ray.engines.token_counter import TokenCounter
from quatro_ray.engines.vllm_outputs import joined, request_params, sampled_so_far, shown_text, to_rollout
from quatro_ray.errors import ConfigError
from quatro_ray.failures import EngineDied
from quatro_ray.seeding import seed_of
from quatro_ray.types import EngineLoad, Installed, Query, Rollout, RolloutGroup, SamplingParams

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM

_CHECKED_SAMPLES = 4
"""Samples for each sequence of a check."""


class GenerationEngine:
    """One AsyncLLM. All methods run on one event loop; those that call vLLM raise EngineDied if its process died.

    Args:
        model_path: folder or hub name of the starting policy.
        sync_backend: name of vLLM's weight transfer back end, "nccl", "ipc" or "gloo".
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
        self._model_path = model_path
        self._config = config
        self._device = device
        self._sync_backend = sync_backend
        self._seed = seed
        self._sleeps = sleeps
        self._version = -1
        self._is_receiving = False
        self._adapter = EngineAdapter(adapter) if adapter else None
        self._num_running = 0
        self._num_generated_tokens = 0
        self._counter = TokenCounter()
        self._llm: AsyncLLM | None = None

    @property
    def llm(self) -> AsyncLLM:
        """The engine of vLLM.

        Raises:
            RuntimeError: the engine is not running, because `start` was not called or `shutdown` was.
        """
        if self._llm is None:
            raise RuntimeError("start() must be called first")
        return self._llm

    async def start(self) -> None:
        """Load the model; its weights are version 0."""
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        args = AsyncEngineArgs(**self._engine_args())
        self._llm = AsyncLLM.from_engine_args(args, stat_loggers=[self._counter.factory])
        self._check_devices(self._llm.vllm_config.parallel_config.world_size_across_dp)
        if self._device == "cpu" and self._config.pipeline_parallel_size > 1:
            # vLLM 0.32 makes the buffers between the stages in a first pass, which it leaves out on CPU
            await self.llm.collective_rpc("execute_dummy_batch")
        if self._adapter:
            await self._adapter.start(self.llm, self._model_path)
        await self.llm.update_weight_version("0")
        self._version = 0

    def _check_devices(self, resolved: int) -> None:
        """Raise ConfigError if vLLM's number of devices is not the one that was reserved, which the learner expects."""
        if resolved != self._config.devices_per_engine:
            raise ConfigError(
                f"generator.engine_args: vLLM would give an engine {resolved} devices, and "
                f"{self._config.devices_per_engine} are reserved (tensor_parallel_size x pipeline_parallel_size x "
                "data_parallel_size); remove the argument that changes their number"
            )

    def _engine_args(self) -> dict[str, Any]:
        config = self._config
        args: dict[str, Any] = {
            "model": self._model_path,
            "dtype": config.dtype,
            "seed": self._seed,
            "tensor_parallel_size": config.tensor_parallel_size,
            "pipeline_parallel_size": config.pipeline_parallel_size,
            "data_parallel_size": config.data_parallel_size,
            "max_num_seqs": 1 if config.deterministic else config.max_num_seqs,
            "max_model_len": config.max_prompt_tokens + config.max_response_tokens,
            # log-probs of the distribution that was sampled from, after temperature and top-p
            "logprobs_mode": "processed_logprobs",
            "weight_transfer_config": {"backend": self._sync_backend},
            "worker_extension_cls": "quatro_ray.weight_sync.checksums.ChecksumWorker",
            "enable_prefix_caching": not config.deterministic,
            "disable_log_stats": True,
        }
        workers = config.tensor_parallel_size * config.pipeline_parallel_size
        if workers > 1:
            # in a placement group vLLM would look for its own bundles by default; the actor already has the devices
            args["distributed_executor_backend"] = "mp"
        if self._device == "cpu":
            args |= cpu_args(config.kv_cache_gib, workers)
            if config.max_num_batched_tokens is not None:
                args["max_num_batched_tokens"] = config.max_num_batched_tokens
        else:
            # on CPU vLLM has no such mode: `sleep` freezes requests and discards keys and values, and frees no memory
            args |= gpu_args(config) | {"enable_sleep_mode": self._sleeps}
        return args | config.engine_args | (self._adapter.engine_args() if self._adapter else {})

    async def generate(
        self,
        group_id: int,
        query: Query,
        sampling: SamplingParams,
        group_size: int,
        begun: tuple[Rollout, ...] = (),
    ) -> RolloutGroup:
        """Sample `group_size` responses, or continue those that another engine has begun.

        Args:
            group_id: id of the result; it has no effect on the sampling.
            query: its prompt is encoded with the model's tokenizer and chat template.
            sampling: `max_tokens` bounds each response, begun tokens included.
            group_size: G, ignored if `begun` is given.
            begun: rollouts of an engine that died; those with a finish_reason are kept as they are. Empty to start
                anew.

        Raises:
            EngineDied: carries what was sampled so far.
            ValueError: the prompt has more than max_prompt_tokens tokens.
        """
        prompt_ids = self._encode(query.prompt)
        async with self._counted():
            if begun:
                rollouts = await self._continue(prompt_ids, sampling, begun)
            else:
                rollouts = await self._complete(prompt_ids, sampling, group_size)
        self._num_generated_tokens += sum(r.num_tokens for r in rollouts) - sum(r.num_tokens for r in begun)
        tail = prompt_tail(self.llm.get_tokenizer(), query.prompt)
        return RolloutGroup(group_id, query, np.asarray(prompt_ids, dtype=np.int32), rollouts, tail)

    async def complete(self, token_ids: list[int], sampling: SamplingParams, stop: Sequence[str] = ()) -> Rollout:
        """Sample one turn of an episode, which continues `token_ids`.

        Args:
            token_ids: the episode so far.
            sampling: `max_tokens` bounds this turn alone.
            stop: strings that end the turn. The text ends with the string that was met; the tokens are those sampled,
                so the last one may reach beyond that string.

        Returns:
            The new tokens alone; spans count from the first of them.
        """
        async with self._counted():
            (rollout,) = await self._complete(token_ids, sampling, 1, stop)
        self._num_generated_tokens += rollout.num_tokens
        return rollout

    async def _continue(
        self, prompt_ids: list[int], sampling: SamplingParams, begun: tuple[Rollout, ...]
    ) -> tuple[Rollout, ...]:
        """Sample the rest of each rollout; EngineDied then carries the new tokens too."""

        async def one(index: int, rollout: Rollout) -> Rollout:
            if rollout.finish_reason:
                return rollout
            so_far = [int(t) for t in rollout.token_ids]
            # a seed of its own, because the original one would repeat the draws of the beginning
            seed = None if sampling.seed is None else seed_of(sampling.seed + index, "go on", len(so_far))
            left = replace(sampling, max_tokens=sampling.max_tokens - len(so_far), seed=seed)
            try:
                (rest,) = await self._complete([*prompt_ids, *so_far], left, 1)
            except EngineDied as died:
                if not died.begun:
                    return rollout
                (rest,) = died.begun
            text = shown_text(self.llm.get_tokenizer(), [*so_far, *rest.token_ids], rest.finish_reason)
            return joined(rollout, rest, text)

        tasks = [asyncio.ensure_future(one(i, r)) for i, r in enumerate(begun)]
        try:
            rollouts = tuple(await asyncio.gather(*tasks))
        finally:
            for task in tasks:  # if one has failed, the others are of no use
                task.cancel()
        if all(r.finish_reason for r in rollouts):
            return rollouts
        raise EngineDied("the engine's process died while it continued rollouts of another engine", rollouts)

    @asynccontextmanager
    async def _counted(self) -> AsyncIterator[None]:
        self._num_running += 1
        try:
            yield
        finally:
            self._num_running -= 1

    async def _complete(
        self, prompt_ids: list[int], sampling: SamplingParams, n: int, stop: Sequence[str] = ()
    ) -> tuple[Rollout, ...]:
        params = request_params(sampling, n, stop)
        # the salt keeps a request that starts under these weights from reading keys and values computed under others
        prompt = {"prompt_token_ids": prompt_ids, "cache_salt": f"v{self._version}"}
        request_id = uuid.uuid4().hex
        with _engine_death(lambda: sampled_so_far(self.llm, request_id, n)):
            async for output in self.llm.generate(prompt, params, request_id, lora_request=self._lora_request()):
                if output.finished:
                    outputs = sorted(output.outputs, key=lambda completion: completion.index)
                    return tuple(to_rollout(completion, self.llm.get_tokenizer()) for completion in outputs)
        raise RuntimeError("vLLM ended a request without a final output")

    def _encode(self, prompt: str) -> list[int]:
        ids = encode_prompt(self.llm.get_tokenizer(), prompt)
        if len(ids) > self._config.max_prompt_tokens:
            raise ValueError(
                f"prompt of {len(ids)} tokens exceeds generator.max_prompt_tokens={self._config.max_prompt_tokens}: "
                f"{prompt[:60]!r}"
            )
        return ids

    def load(self) -> EngineLoad:
        """Return what the engine is doing."""
        return EngineLoad(
            num_running=self._num_running,
            num_generated_tokens=self._num_generated_tokens,
            num_sampled_tokens=self._counter.num_sampled_tokens,
            is_alive=self._llm is None or not self._llm.errored,
            kv_cache_usage=self._counter.kv_cache_usage,
            num_draft_tokens=self._counter.num_draft_tokens,
            num_accepted_tokens=self._counter.num_accepted_tokens,
        )

    # Weight transfer: vLLM's own calls, after init in the order pause → start → update → finish → resume; with gloo
    # receive_weights (start → update), while generation continues, and then install_weights (pause → finish → resume)

    async def pause(self) -> int:
        """Freeze running requests, and return how many groups and turns of episodes there are."""
        with _engine_death():
            await self.llm.pause_generation(mode="keep", clear_cache=False)
        return self._num_running

    async def resume(self) -> None:
        """Continue the requests that `pause` froze, under the weights that the engine holds now."""
        with _engine_death():
            await self.llm.resume_generation()

    async def sleep(self) -> None:
        """Free the device's memory: weights move to host memory, keys and values are discarded, requests frozen."""
        with _engine_death():
            await self.llm.sleep(level=1, mode="keep")

    async def wake_up(self) -> None:
        """Take the device's memory back and continue the frozen requests, whose keys and values are computed again."""
        with _engine_death():
            await self.llm.wake_up()

    async def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connect the engine's workers to the learner; an earlier connection is released first.

        Args:
            init_info: fields of the back end's WeightTransferInitInfo, such as address, port and rank offset.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        if not self._is_receiving:  # during an update, which gloo alone continues over a new connection, vLLM refuses
            await self.llm.shutdown_weight_transfer_engine()
        await self.llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=init_info))

    async def start_weight_update(self) -> None:
        """Prepare the workers to receive a new version of the weights."""
        await self.llm.start_weight_update()

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive weights from the learner and load them.

        Args:
            update_info: names, dtypes and shapes of the tensors, in the order in which they are sent.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self.llm.update_weights(WeightTransferUpdateRequest(update_info=update_info))

    async def finish_weight_update(self, version: int) -> None:
        """Complete the update; tokens sampled from now on are of policy `version`."""
        await self.llm.finish_weight_update(weight_version=str(version))
        self._version = version

    async def receive_weights(self) -> None:
        """Begin to receive a new version in the background; only with gloo. Repeat it after a new connection.

        An adapter comes by `receive_adapter` instead, so that nothing has to begin.
        """
        if self._adapter:
            return
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        # both calls are queued together, so that they wait for one step of the engine's process and not for two
        calls = [] if self._is_receiving else [self.llm.start_weight_update()]
        self._is_receiving = True
        with _engine_death():
            await asyncio.gather(*calls, self.llm.update_weights(WeightTransferUpdateRequest(update_info={})))

    def receive_adapter(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep the tensors of a new version of the adapter, by their names in peft's files, until `install_weights`."""
        assert self._adapter is not None
        self._adapter.receive(tensors)

    def _lora_request(self) -> LoRARequest | None:
        return self._adapter.request() if self._adapter else None

    async def install_weights(self, version: int) -> Installed:
        """Load the weights that `receive_weights` received; requests are paused and continue under `version`."""
        start = time.monotonic()
        with _engine_death():
            num_in_flight = self._num_running
            # pause_generation would also wait 20 ms for outputs on their way here, which carry their version already
            await self.llm.engine_core.pause_scheduler_async(mode="keep", clear_cache=False)
            if self._adapter:
                await self._adapter.install(self.llm)
                await self.llm.update_weight_version(str(version))
                self._version = version
            else:
                await self.finish_weight_update(version)
            self._is_receiving = False
            reported = await self.policy_version()
            await self.resume()
        return Installed(reported, num_in_flight, time.monotonic() - start)

    async def policy_version(self) -> int:
        """Return the version that the engine's own process reports."""
        with _engine_death():
            return int(await self.llm.get_weight_version())

    async def score(self, sequences: list[list[int]]) -> list[list[float]]:
        """Return the log-prob of each token but the first, given those before it, in nats at temperature 1."""
        with _engine_death():
            return list(await asyncio.gather(*map(self._score, sequences)))

    async def _score(self, token_ids: list[int]) -> list[float]:
        from vllm import SamplingParams as VllmSamplingParams
        from vllm import TokensPrompt

        params = VllmSamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False)
        prompt = TokensPrompt(prompt_token_ids=token_ids)
        request_id = f"score-{uuid.uuid4().hex}"
        async for output in self.llm.generate(prompt, params, request_id, lora_request=self._lora_request()):
            found = output.prompt_logprobs
        assert found is not None
        return [position[token].logprob for position, token in zip(found[1:], token_ids[1:], strict=True)]

    async def sampling_error(self, sequences: list[list[int]]) -> float:
        """Return by how much the behaviour log-probs of sampled tokens differ from the scores of the same tokens.

        Speculative decoding and the like must not change them; `score` itself samples nothing.

        Args:
            sequences: of at least two tokens. The first half of each is a prompt, and the samples are as long as the
                rest.

        Returns:
            The mean absolute difference, nats at temperature 1; NaN if any log-prob is.
        """

        async def differences(ids: list[int]) -> list[float]:
            half = len(ids) // 2
            sampling = SamplingParams(1.0, 1.0, len(ids) - half, 0)
            rollouts = await self._complete(ids[:half], sampling, _CHECKED_SAMPLES)
            scores = await self.score([[*ids[:half], *map(int, rollout.token_ids)] for rollout in rollouts])
            pairs = zip(rollouts, scores, strict=True)
            return [x for r, found in pairs for x in np.abs(r.behavior_logprobs - np.asarray(found[half - 1 :]))]

        return float(np.mean(np.concatenate(await asyncio.gather(*map(differences, sequences)))))

    async def parameter_checksums(self) -> list[dict[str, str]]:
        """Return dtype, shape and checksum of each worker's parameters by name (weight_sync/checksums.py)."""
        with _engine_death():
            # AsyncLLM.collective_rpc would return the answers of the first data-parallel copy only
            core = self.llm.engine_core
            copies = await core.call_utility_all_async("collective_rpc", "parameter_checksums", None, (), {})
        return [worker for workers in copies for worker in workers]

    async def weight_checksums(self) -> dict[str, str]:
        """Return the SHA-256 of every worker's parameters by name."""
        merged: dict[str, str] = {}
        for worker in await self.llm.compute_weight_checksums():
            merged |= worker
        return merged

    async def shutdown(self) -> None:
        """End the engine's processes; a second call does nothing."""
        if self._llm is not None:
            await asyncio.to_thread(self._llm.shutdown)
            self._llm = None
        if self._adapter:
            self._adapter.close()


@contextmanager
def _engine_death(begun: Callable[[], tuple[Rollout, ...]] = tuple) -> Iterator[None]:
    """Translate EngineDeadError to EngineDied, because unpickling vLLM's exception would import vLLM in the caller.

    Args:
        begun: returns the rollouts that EngineDied carries.
    """
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        yield
    except EngineDeadError as error:
        raise EngineDied(f"the engine's process died: {error}", begun()) from None
