"""Plans the memory of a GPU that an engine and a learner rank share (`cluster.colocate`). Loads no torch.

The engine's part is fixed: weights, keys and values, and what vLLM needs besides. The rank may take the rest, which is
enforced, so that the one that needs more than its part fails, and not the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from quatro_ray.config import Config
from quatro_ray.engines.model_shape import ModelShape, model_shape
from quatro_ray.errors import ConfigError
from quatro_ray.orchestrator.resources import (
    BYTES,
    learner_bytes_on_device,
    num_adapter_parameters,
    num_parameters,
    weight_bytes_per_device,
)

_GIB = 2**30
_ENGINE_BESIDES_GIB = 2.5
"""An engine's CUDA context (0.5), activations and logits of a step, and CUDA graphs."""
_ASLEEP_GIB = 1.5
"""CUDA context and graphs of an engine that sleeps."""
_CONTEXT_GIB = 0.5
"""A rank's CUDA context, which PyTorch does not count as its own."""
_RANK_BESIDES_GIB = 1.0
"""A rank's CUDA context, buckets of DeepSpeed's collectives, and fragmentation."""

_BYTES_OF_A_TRAINED_WEIGHT = 22
"""In bfloat16 with its gradient, master copy, moments and the copy of step control."""


@dataclass(frozen=True)
class DeviceMemory:
    """The planned parts of a shared device, in GiB.

    Attributes:
        total: what the device has.
        engine: the engine's part while it runs.
        engine_asleep: the engine's part while the learner trains; the same as `engine` if they overlap.
        states: weights, gradients and optimiser states of the rank.
        training: what the rank takes on top while it trains: activations, logits and buffers.
    """

    total: float
    engine: float
    engine_asleep: float
    states: float
    training: float

    @property
    def need(self) -> float:
        """The largest sum at one time, GiB."""
        return self.states + max(self.engine, self.engine_asleep + self.training)

    @property
    def engine_share(self) -> float:
        """Share of the device that must be free when the engine starts."""
        return self.engine / self.total

    @property
    def rank_share(self) -> float:
        """Share of the device that PyTorch may take in the rank."""
        return 1 - (self.engine_asleep + _CONTEXT_GIB) / self.total


def shares_gpu(config: Config) -> bool:
    """Tell if engines and ranks share GPUs."""
    return config.cluster.colocate and config.cluster.device == "cuda"


def device_memory(config: Config) -> DeviceMemory:
    """Return the plan for each GPU of a configuration with `cluster.colocate`.

    Raises:
        ConfigError: the size of the model is unknown, or its configuration cannot be loaded.
    """
    total, cache = config.cluster.gpu_memory_gib, config.generator.kv_cache_gib
    assert total is not None
    assert cache is not None
    parameters = num_parameters(config)
    if parameters is None:
        raise ConfigError(
            "model.num_parameters=null: the memory of a shared GPU cannot be planned, because the model's files are "
            "not there; set it"
        )
    shape = model_shape(config)
    engine = weight_bytes_per_device(config, parameters) / _GIB + cache + _ENGINE_BESIDES_GIB
    states = learner_bytes_on_device(config, parameters) + _unknown_adapter_bytes(config, shape)
    return DeviceMemory(
        total=total,
        engine=engine,
        engine_asleep=_ASLEEP_GIB if config.alternates else engine,
        states=states / _GIB,
        training=training_bytes(config, shape) / _GIB + _RANK_BESIDES_GIB,
    )


def training_bytes(config: Config, shape: ModelShape) -> float:
    """Estimate the bytes that a rank needs for activations and logits of one micro-batch.

    A layer keeps about 12 numbers of hidden size and 4.5 of intermediate size for each token, which is the growth with
    the tokens of a row that was measured on an H100 (docs/results.md). A chunk's logits exist three times in float32.
    """
    learner = config.learner
    tokens, width = learner.tokens_per_micro_batch, BYTES[learner.dtype]
    layer = tokens * width * (12 * shape.hidden_size + 4.5 * shape.intermediate_size)
    inputs = tokens * width * shape.hidden_size * shape.num_layers
    layers = inputs + layer if learner.gradient_checkpointing else layer * shape.num_layers
    return layers / learner.sequence_parallel_size + 3 * 4 * learner.logprob_chunk_tokens * shape.vocab_size


def _unknown_adapter_bytes(config: Config, shape: ModelShape) -> float:
    """Return the bytes of a rank's states of adapters whose sizes no file here tells, as of all linear layers."""
    lora = config.learner.lora
    if lora is None or num_adapter_parameters(config):
        return 0.0
    attention, mlp = 4 * 2 * shape.hidden_size, 3 * (shape.hidden_size + shape.intermediate_size)
    weights = lora.rank * shape.num_layers * (attention + mlp)
    return weights * _BYTES_OF_A_TRAINED_WEIGHT / config.learner.num_ranks


def check_device_memory(config: Config) -> None:
    """Check that engine and rank fit on the GPU that they are to share.

    Raises:
        ConfigError: they do not, or the size of the model is unknown.
    """
    if shares_gpu(config):
        _refuse_if_too_large(config, device_memory(config))


def describe_device_memory(config: Config) -> Iterator[str]:
    """Yield the lines of `quatro-ray plan` about a shared GPU; none if no GPU is shared.

    Raises:
        ConfigError: engine and rank do not fit.
    """
    if not shares_gpu(config):
        return
    try:
        plan = device_memory(config)
    except ConfigError as error:
        yield f"a shared GPU: unknown without the model's config.json, which `quatro-ray validate` fetches ({error})"
        return
    yield f"a shared GPU: {_sum(config, plan)}"
    _refuse_if_too_large(config, plan)


def _refuse_if_too_large(config: Config, plan: DeviceMemory) -> None:
    if plan.need > plan.total:
        raise ConfigError(
            f"cluster.gpu_memory_gib={plan.total:g}: engine and rank need {plan.need:.1f} GiB ({_sum(config, plan)}); "
            f"lower generator.kv_cache_gib or learner.tokens_per_micro_batch, {_settings(config)}"
            "or take a smaller model"
        )


def _settings(config: Config) -> str:
    """Return the settings that save memory and are not made yet, as part of a sentence."""
    learner = config.learner
    made = {
        "learner.gradient_checkpointing=true": learner.gradient_checkpointing,
        "learner.offload=cpu": learner.offload == "cpu",
        "learner.lora": learner.lora is not None,
        "cluster.colocate_mode=alternating": config.alternates,
    }
    missing = [setting for setting, is_made in made.items() if not is_made]
    return f"set {' or '.join(missing)}, " if missing else ""


def _sum(config: Config, plan: DeviceMemory) -> str:
    asleep = f", {plan.engine_asleep:.1f} asleep" if config.alternates else ""
    return (
        f"engine {plan.engine:.1f} GiB ({config.generator.kv_cache_gib:g} of keys and values){asleep}; rank "
        f"{plan.states:.1f} GiB of states, {plan.training:.1f} more while it trains; at most {plan.need:.1f} of "
        f"{plan.total:g} GiB at a time"
    )
