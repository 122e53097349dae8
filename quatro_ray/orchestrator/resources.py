"""The actors, batch sizes and memory that a configuration implies. Loads neither torch nor ray nor vllm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from quatro_ray.config import Config, ModelRewardConfig, PretrainedModelConfig, TinyModelConfig
from quatro_ray.config.generator import CPU_KV_CACHE_GIB
from quatro_ray.config.weight_sync import NUM_TRANSFER_BUFFERS
from quatro_ray.engines.weight_files import num_weights, weight_shapes

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a number, by the name of its format."""
_TINY_VOCABULARY = 258


SHARED_DEVICE = "engine and rank"
"""The role of a bundle in which an engine and a learner rank share a device."""
_SHARE = 0.5
"""Part of a GPU that Ray books for each of two actors; orchestrator/device_memory.py divides its memory."""


@dataclass(frozen=True)
class Bundle:
    """The resources of one actor, or of an engine and a rank that share a device.

    Attributes:
        role: role of the actor, such as "generator" or "verifier", or SHARED_DEVICE.
        index: number of the actor within its role.
        resources: amounts by Ray's names, CPU and GPU.
        shares: what each of several actors takes of `resources`, by its role; empty if there is one actor.
    """

    role: str
    index: int
    resources: dict[str, float]
    shares: Mapping[str, dict[str, float]] = field(default_factory=dict)

    def by_role(self) -> Mapping[str, dict[str, float]]:
        """Return the resources of each actor in the bundle."""
        return self.shares or {self.role: self.resources}


def bundles(config: Config) -> list[Bundle]:
    """Return the bundles of a training run, without those of engines that may join later."""
    cluster = config.cluster

    def make(role: str, count: int, cpus: float, gpus: int) -> list[Bundle]:
        return [_bundle(config, role, i, cpus, gpus) for i in range(count)]

    return [
        *(_shared_bundles(config) if cluster.colocate else _separate_bundles(config)),
        *make("evaluator", config.evaluation.num_engines, cluster.cpus_per_engine, config.generator.devices_per_engine),
        *(
            bundle
            for name, part in config.rewards.items()
            if isinstance(part, ModelRewardConfig)
            for bundle in make(f"reward model {name}", part.num_engines, cluster.cpus_per_engine, 1)
        ),
        *make("verifier", config.verifier.num_actors, config.verifier.num_workers * cluster.cpus_per_verifier, 0),
        *(
            bundle
            for name, environment in config.environments.items()
            for bundle in make(f"environment {name}", environment.num_actors, cluster.cpus_per_environment, 0)
        ),
        *make("replay", 1, min(0.1, cluster.cpus_per_rank), 0),
    ]


def _separate_bundles(config: Config) -> list[Bundle]:
    return [*(engine_bundle(config, i) for i in range(config.generator.num_engines)), *learner_bundles(config)]


def _shared_bundles(config: Config) -> list[Bundle]:
    def share(actor: Bundle) -> dict[str, float]:
        return {name: amount * (_SHARE if name == "GPU" else 1) for name, amount in actor.resources.items()}

    def both(rank: Bundle) -> Bundle:
        shares = {actor.role: share(actor) for actor in (engine_bundle(config, rank.index), rank)}
        names = dict.fromkeys(name for resources in shares.values() for name in resources)
        total = {name: sum(resources.get(name, 0) for resources in shares.values()) for name in names}
        return Bundle(SHARED_DEVICE, rank.index, total, shares)

    return [both(rank) for rank in learner_bundles(config)]


def engine_bundle(config: Config, index: int) -> Bundle:
    """Return the bundle of one engine for training."""
    return _bundle(config, "generator", index, config.cluster.cpus_per_engine, config.generator.devices_per_engine)


def learner_bundles(config: Config) -> list[Bundle]:
    """Return the bundles of all learner ranks, each with a device of its own."""
    return [_bundle(config, "learner", i, config.cluster.cpus_per_rank, 1) for i in range(config.learner.num_ranks)]


def placement_groups(plan: Sequence[Bundle]) -> list[list[Bundle]]:
    """Divide the bundles of a plan into placement groups: the learner's, that of other actors, and one per engine.

    Ray places the lost bundles of a group again only together, and packs each group by itself. So the ranks get one
    node if one has room for them, and neither a rank nor a verifier waits for the place of a lost engine. Ray places
    groups in the order of their creation, so the largest come first: small ones find room in what is left.
    """
    learner = [bundle for bundle in plan if "learner" in bundle.by_role()]
    engines = [bundle for bundle in plan if bundle.role == "generator"]
    others = [bundle for bundle in plan if bundle not in learner and bundle not in engines]
    groups = [group for group in (learner, *([engine] for engine in engines), others) if group]
    return sorted(groups, key=lambda group: (_sum_of(group, "GPU"), _sum_of(group, "CPU")), reverse=True)


def _sum_of(group: Sequence[Bundle], name: str) -> float:
    return sum(bundle.resources.get(name, 0) for bundle in group)


def _bundle(config: Config, role: str, index: int, cpus: float, gpus: int) -> Bundle:
    resources = {"CPU": cpus, "GPU": float(gpus) if config.cluster.device == "cuda" else 0.0}
    return Bundle(role, index, {name: amount for name, amount in resources.items() if amount} or {"CPU": 0.001})


def evaluation_bundles(config: Config) -> list[Bundle]:
    """Return the bundles of `quatro-ray eval`: no learner, no buffer, and at least one engine."""
    alone = config.model_copy(
        update={"evaluation": config.evaluation.model_copy(update={"num_engines": config.evaluation.num_engines or 1})}
    )
    return [b for b in bundles(alone) if b.role not in ("generator", "learner", "replay", SHARED_DEVICE)]


def num_parameters(config: Config) -> int | None:
    """Return the number of the model's parameters, or None if it is unknown.

    It is exact for a tiny model. For a pretrained one it is `model.num_parameters`, or what the headers of its
    safetensors files say.

    Raises:
        ConfigError: a file of weights is damaged.
    """
    model = config.model
    if isinstance(model, TinyModelConfig):
        d = model.hidden_size
        kv = d * max(1, model.num_heads // 2) // model.num_heads
        attention = d * d + d + 2 * (d * kv + kv) + d * d
        return _TINY_VOCABULARY * d + model.num_layers * (attention + 12 * d * d + 2 * d) + d
    assert isinstance(model, PretrainedModelConfig)
    if model.num_parameters is not None:
        return model.num_parameters
    return num_weights(Path(model.path))


def learner_bytes_per_rank(config: Config, parameters: int) -> int:
    """Return the bytes of a rank's ZeRO-3 model states.

    These are weights; for those that are trained float32 gradients, AdamW's float32 master copy and two moments, and
    for step control the float32 weights before the step; for a reference policy without adapters, one more copy of the
    weights; and the rank's part of hpZ's copy.

    Args:
        config: its `learner` section gives the dtype, the number of ranks and which of these copies exist.
        parameters: number of the model's parameters.
    """
    width = BYTES[config.learner.dtype]
    master = 0 if config.learner.dtype == "float32" else 4
    adapters = num_adapter_parameters(config)
    trained = parameters if adapters is None else adapters
    held = parameters + (adapters or 0)
    reference = width if config.learner.reference_kl_coef > 0 and adapters is None else 0
    before_step = 0 if config.learner.step_control.window_kl_nats_per_token is None else 4
    states = held * width + trained * (4 + master + 8 + before_step) + parameters * reference
    group = config.learner.hpz_partition_size
    return states // config.learner.num_ranks + (held * width // group if group > 1 else 0)


def num_adapter_parameters(config: Config) -> int | None:
    """Return the number of weights of the adapters; None if all weights are trained.

    It is an estimate from the shapes in the model's files, and 0 if there are none here, as for a model on the hub.

    Raises:
        ConfigError: a file of weights is damaged.
    """
    lora, model = config.learner.lora, config.model
    if lora is None:
        return None
    shapes = _tiny_layer(model) if isinstance(model, TinyModelConfig) else weight_shapes(Path(model.path)) or {}
    widths = sum(sum(shape) for name, shape in shapes.items() if _is_adapted(name, shape, lora.target_modules))
    return lora.rank * widths * (model.num_layers if isinstance(model, TinyModelConfig) else 1)


def _is_adapted(name: str, shape: Sequence[int], targets: str | Sequence[str]) -> bool:
    """Return whether a weight on disk gets an adapter: experts are one tensor for all in memory, and get none."""
    layer = name.removesuffix(".weight")
    if len(shape) != 2 or ".experts." in layer or not any(part.isdigit() for part in layer.split(".")):
        return False
    return targets == "all-linear" or any(f".{layer}".endswith(f".{target}") for target in targets)


def _tiny_layer(model: TinyModelConfig) -> dict[str, list[int]]:
    """Return the shapes of the linear weights of one layer of a tiny model."""
    d, kv = model.hidden_size, model.hidden_size * max(1, model.num_heads // 2) // model.num_heads
    attention = {"q_proj": [d, d], "k_proj": [kv, d], "v_proj": [kv, d], "o_proj": [d, d]}
    mlp = {"gate_proj": [4 * d, d], "up_proj": [4 * d, d], "down_proj": [d, 4 * d]}
    return {f"model.layers.0.{name}.weight": shape for name, shape in (attention | mlp).items()}


def learner_bytes_on_device(config: Config, parameters: int) -> int:
    """Return the part of `learner_bytes_per_rank` that is not offloaded to host memory.

    Args:
        config: its `learner` section says what is offloaded.
        parameters: number of the model's parameters.
    """
    learner = config.learner
    if learner.offload == "none":
        return learner_bytes_per_rank(config, parameters)
    copies = (not learner.offload_parameters) + (learner.reference_kl_coef > 0 and learner.lora is None)
    return copies * parameters * BYTES[learner.dtype] // learner.num_ranks


def weight_bytes_per_device(config: Config, parameters: int) -> float:
    """Return the bytes of an engine's weights on each of its devices.

    Args:
        config: its `generator` section gives the dtype and the number of devices that divide the weights.
        parameters: number of the model's parameters.
    """
    shares = config.generator.tensor_parallel_size * config.generator.pipeline_parallel_size
    return parameters * BYTES[config.generator.dtype] / shares


def transfer_buffer_bytes(config: Config) -> int:
    """Return the bytes of the buffers of a weight update, on learner rank 0 and on each device of an engine.

    With NCCL each buffer may grow by a tensor, up to the largest one; gloo and adapters need none on devices.
    """
    uses_nccl = config.sync_backend == "nccl" and config.engine_adapter is None
    return NUM_TRANSFER_BUFFERS * (config.weight_sync.buffer_mib << 20) if uses_nccl else 0


def describe(config: Config) -> str:
    """Return the text of `quatro-ray plan`."""
    replay, learner, generator = config.replay, config.learner, config.generator
    rollouts = replay.groups_per_step * replay.group_size
    longest = generator.max_prompt_tokens + generator.max_response_tokens
    ahead = (replay.max_staleness + 1) * replay.groups_per_step
    lines = ["actors"]
    plan = bundles(config)
    for role in dict.fromkeys(b.role for b in plan):
        same = [b for b in plan if b.role == role]
        each = ", ".join(f"{v:g} {k}" for k, v in same[0].resources.items())
        lines.append(f"  {len(same)} × {role}: {each} each")
    for name in ("CPU", "GPU"):
        lines.append(f"  together {sum(b.resources.get(name, 0) for b in plan):g} {name}")
    if (num_more := generator.max_num_engines - generator.num_engines) > 0:
        lines.append(f"  up to {num_more} more × generator, each when the cluster has room")
    num_rows = learner.num_ranks // learner.sequence_parallel_size
    lines += [
        "batch",
        f"  {replay.groups_per_step} queries × {replay.group_size} rollouts = {rollouts} rollouts a step, "
        f"{config.run.num_steps} steps, {rollouts * config.run.num_steps:,} rollouts in all",
        f"  at most {longest} tokens a rollout, {rollouts * longest:,} a step, "
        f"{-(-rollouts * longest // (num_rows * learner.tokens_per_micro_batch))} micro-batches a rank",
        f"  at most {ahead} groups ahead of the learner (staleness ≤ {replay.max_staleness}), "
        f"{generator.num_engines * generator.max_groups_in_flight} in the engines",
        *_engine_lines(config),
        "memory (estimates; activations and logits come on top)",
    ]
    return "\n".join([*lines, *_memory(config)])


def _engine_lines(config: Config) -> list[str]:
    """Return what an engine has to do, with advice if long responses would leave it without enough."""
    generator, size = config.generator, config.replay.group_size
    most, at_once = generator.max_groups_in_flight * size, generator.max_num_seqs
    line = f"  at most {most} responses in an engine, which decodes {at_once} at the same time"
    if most >= 2 * at_once:
        return [line]
    return [
        line,
        "  advice: a group leaves its engine with its longest response, and meanwhile nothing takes the place of its "
        f"short ones; with generator.max_groups_in_flight={-(-2 * at_once // size)} something always waits",
    ]


def _memory(config: Config) -> list[str]:
    parameters = num_parameters(config)
    if parameters is None:
        return ["  unknown size: set model.num_parameters"]
    gib = 2**30
    states = learner_bytes_per_rank(config, parameters) / gib
    weights = weight_bytes_per_device(config, parameters) / gib
    lines = [
        f"  {parameters:,} parameters{_frozen(num_adapter_parameters(config))}",
        f"  learner: {states:.3f} GiB of model states a rank"
        + (" (optimiser part on the CPU)" if config.learner.offload == "cpu" else ""),
        f"  engine: {weights:.3f} GiB of weights a device",
    ]
    if config.sync_backend == "gloo" and config.engine_adapter is None:
        received = parameters * BYTES[config.learner.dtype] / gib
        lines.append(f"  engine: {received:.3f} GiB of host memory a device while it receives new weights")
    elif buffers := transfer_buffer_bytes(config):
        lines.append(
            f"  learner rank 0, and each device of an engine: {buffers / gib:.3f} GiB of buffers during a weight update"
            f" ({NUM_TRANSFER_BUFFERS}, each of which may grow by the largest tensor)"
        )
    cache = config.generator.kv_cache_gib or (CPU_KV_CACHE_GIB if config.cluster.device == "cpu" else None)
    if cache is not None:
        lines.append(f"  engine: {cache:g} GiB of keys and values")
    else:
        lines.append(f"  engine: {config.generator.gpu_memory_utilization:.0%} of a GPU, weights included")
    return lines


def _frozen(num_adapter: int | None) -> str:
    if num_adapter is None:
        return ""
    return (
        f", frozen; {num_adapter:,} in adapters" if num_adapter else ", frozen; adapters unknown without its files here"
    )
