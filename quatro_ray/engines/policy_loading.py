"""Loads the learner's policy, with the fastest attention whose log-probs are the model's own."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from quatro_ray.config.lora import LoraConfig
from quatro_ray.engines.forward_check import ForwardCheck
from quatro_ray.engines.lora import Adapters
from quatro_ray.engines.model_files import check_files
from quatro_ray.engines.policy import PolicyModel
from quatro_ray.engines.sharded_loading import build_sharded
from quatro_ray.engines.varlen_attention import VARLEN
from quatro_ray.errors import ConfigError
from quatro_ray.types import RowLayout

_logger = logging.getLogger(__name__)
_MEASURED_LAYERS = 4
"""Layers of a sharded model that are measured whole, if these have all kinds of layers."""
_NOISE = ("drop", "jitter")
"""Words in the names of settings that make a forward pass random in training mode."""


def load_policy(
    path: str,
    *,
    dtype: torch.dtype,
    attn_implementation: str,
    temperature: float,
    chunk_tokens: int,
    gradient_checkpointing: bool = False,
    lora: LoraConfig | None = None,
    device: torch.device | None = None,
    zero_config: Mapping[str, Any] | None = None,
) -> tuple[PolicyModel, str]:
    """Load a policy and measure that its log-probs are the model's own.

    A sharded policy is never whole on any rank, so its first layers are measured, by each rank for itself.

    Args:
        path: folder or hub name.
        dtype: that of the weights.
        attn_implementation: "auto", or transformers' name of it.
        temperature: that of the sampling.
        chunk_tokens: most tokens whose logits exist at a time.
        gradient_checkpointing: whether backward passes recompute the activations of each layer.
        lora: adapters that the policy gets; all its other parameters are frozen then. With random adapters, it is
            measured against the model whose weights contain them.
        device: where to measure, because some kinds of attention run on GPUs alone. None: the CPU.
        zero_config: DeepSpeed's configuration, to shard the policy over the ranks; a collective. None: the policy is
            whole, and on the CPU.

    Returns:
        The policy, and a line that says what was measured.

    Raises:
        ConfigError: the learner's log-probs or gradients would not be those of the model, exports would fail, or the
            model cannot have these adapters.
    """
    check_files(path)
    config = _config_without_noise(path)
    measured = [config] if zero_config is None else [first_layers(config), config]
    causal_lm = _load_first(path, measured, dtype, attn_implementation).to(device or torch.device("cpu"))
    adapters = Adapters(causal_lm, lora) if lora else None
    name = f"model.path={path}{' with learner.lora' if lora else ''}"
    with adapters.measured() if adapters else nullcontext():
        check = ForwardCheck(causal_lm, name, temperature)
    policy = PolicyModel(causal_lm, temperature=temperature, chunk_tokens=chunk_tokens, adapters=adapters)
    if gradient_checkpointing:
        _checkpoint_gradients(causal_lm, path)
    wanted = (VARLEN, policy.attention) if attn_implementation == "auto" else (attn_implementation,)
    line = choose_attention(policy, check, wanted)
    if zero_config is None:
        if adapters:
            adapters.reset()
        return policy.cpu(), line
    attention, layout = policy.attention, policy.row_layout
    del causal_lm, check, policy, adapters
    sharded = build_sharded(path, config, dtype=dtype, attn_implementation=attention, zero_config=zero_config)
    if gradient_checkpointing:
        _checkpoint_gradients(sharded, path)
    adapters = Adapters(sharded, lora) if lora else None
    policy = PolicyModel(sharded, temperature=temperature, chunk_tokens=chunk_tokens, adapters=adapters)
    policy.row_layout = layout
    return policy, line


def _load_first(
    path: str, configs: Sequence[PretrainedConfig], dtype: torch.dtype, attn_implementation: str
) -> PreTrainedModel:
    """Load the model with the first configuration with which it loads; some have no first layers by themselves."""
    for config in configs[:-1]:
        try:
            return _load_causal_lm(path, config, dtype, attn_implementation)
        except ConfigError as error:
            _logger.warning("%s: its first layers do not load alone, so it is measured whole (%s)", path, error)
    return _load_causal_lm(path, configs[-1], dtype, attn_implementation)


def _load_causal_lm(
    path: str, config: PretrainedConfig, dtype: torch.dtype, attn_implementation: str
) -> PreTrainedModel:
    """Load the model with an attention of transformers' own, against which others are measured."""
    own = {"auto": ("sdpa", "eager"), VARLEN: ("sdpa", "eager")}.get(attn_implementation, (attn_implementation,))
    for number, kind in enumerate(own, start=1):
        try:
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
                path, config=config, dtype=dtype, attn_implementation=kind
            )
        except (OSError, ValueError, ImportError, RuntimeError) as error:
            if number < len(own):
                continue
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"model.path={path}: cannot be loaded with learner.attn_implementation={attn_implementation} "
                f"({reason}); choose another attention, such as auto, or another model"
            ) from error
        return model
    raise AssertionError("there is always a kind to try")


def first_layers(config: PretrainedConfig) -> PretrainedConfig:
    """Return the configuration of a model's first layers: at least four, and one of each kind that it lists."""
    short = copy.deepcopy(config)
    part = short.get_text_config()
    total = part.num_hidden_layers
    count = min(total, _MEASURED_LAYERS)
    per_layer = {name: value for name, value in vars(part).items() if isinstance(value, list) and len(value) == total}
    named = [getattr(part, name, None) for name in ("layer_types", "layers_block_type")]  # properties of some
    for value in [*per_layer.values(), *(kinds for kinds in named if isinstance(kinds, list) and len(kinds) == total)]:
        kinds = {str(kind): number for number, kind in reversed(list(enumerate(value, start=1)))}
        if len(kinds) <= _MEASURED_LAYERS:
            count = max(count, *kinds.values())
    for name, value in per_layer.items():
        setattr(part, name, value[:count])
    part.num_hidden_layers = count
    return short


def _config_without_noise(path: str) -> PretrainedConfig:
    """Return the model's configuration with every dropout and jitter at 0, so that training mode changes no number."""
    config: PretrainedConfig = AutoConfig.from_pretrained(path)
    parts = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    for part in parts:
        for name, value in list(vars(part).items()) if part is not None else []:
            if any(word in name for word in _NOISE) and isinstance(value, float):
                setattr(part, name, 0.0)
    return config


def _checkpoint_gradients(causal_lm: PreTrainedModel, path: str) -> None:
    """Let each layer keep its input alone; transformers' layers do that in training mode only."""
    try:
        causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise ConfigError(
            f"learner.gradient_checkpointing=true: model.path={path} does not support it ({error}); set it to false"
        ) from error
    causal_lm.train()


def choose_attention(policy: PolicyModel, check: ForwardCheck, wanted: Sequence[str]) -> str:
    """Set the first kind of attention with which sequences may be packed, or else the first that works at all.

    Args:
        policy: its attention and `row_layout` are set.
        check: that of the model.
        wanted: transformers' names, the best first.

    Returns:
        A line that says what was measured, and why the first kind is not used.

    Raises:
        ConfigError: no kind works.
    """
    found: dict[str, tuple[RowLayout, str]] = {}
    refusals: dict[str, ConfigError] = {}
    for kind in wanted:
        try:
            _set_attention(policy, kind, check)
            found[kind] = check.layout(policy)
        except ConfigError as error:
            refusals[kind] = error
            continue
        if policy.row_layout == "packed":
            break
    if not found:
        raise refusals[wanted[-1]]
    chosen = max(found, key=lambda kind: found[kind][0] == "packed")
    _set_attention(policy, chosen, check)
    policy.row_layout, line = found[chosen]
    passed_over = [f"not {kind} ({check.reason(error)})" for kind, error in refusals.items()]
    passed_over += [
        f"not {kind}, with which they change each other" for kind in found if found[kind][0] != policy.row_layout
    ]
    return "; ".join([line, f"attention: {chosen}", *passed_over])


def _set_attention(policy: PolicyModel, kind: str, check: ForwardCheck) -> None:
    """Set the attention of all layers. Raise ConfigError if the model has code of its own for it."""
    policy.causal_lm.set_attn_implementation(kind)
    if policy.attention != kind:
        raise ConfigError(f"{check.name}: it has attention of its own, not transformers' interface")
