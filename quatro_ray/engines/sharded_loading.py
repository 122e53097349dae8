"""Builds a model that ZeRO-3 has sharded from the start, so that no rank ever holds more than a layer of it whole.

All ranks call these functions together. Rank 0 reads the files, one layer after the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.initialization import no_init_weights
from transformers.integrations.deepspeed import _apply_weight_conversions_to_state_dict

from quatro_ray.engines.weight_files import weight_files
from quatro_ray.errors import ConfigError

_LAYER = re.compile(r"^.*?\.\d+(?=\.)")
"""The part of a tensor's name that names its layer: everything up to the first number."""


def build_sharded(
    path: str,
    config: PretrainedConfig,
    *,
    dtype: torch.dtype,
    attn_implementation: str,
    zero_config: Mapping[str, Any],
) -> PreTrainedModel:
    """Return the model of a folder, its parameters sharded over the ranks; a collective.

    Args:
        path: folder or hub name.
        config: the model's configuration.
        dtype: that of the weights.
        attn_implementation: transformers' name of the attention.
        zero_config: DeepSpeed's configuration.

    Raises:
        ConfigError: a weight of the model is in no file, or has another shape there.
    """
    from deepspeed import zero
    from deepspeed.runtime.zero.partition_parameters import DeepSpeedTensorOverride

    folder = folder_with_weights(path)

    class Sharding(zero.Init):
        """Gives every parameter the dtype of the run: DeepSpeed refuses a mixture, and some models name float32."""

        def _zero_init_param(self, param: nn.Parameter) -> None:
            if param.is_floating_point():
                param.data = param.data.to(dtype)
            super()._zero_init_param(param)

    sharding = Sharding(
        config_dict_or_path=dict(zero_config),
        dtype=dtype,
        mem_efficient_linear=False,
        # not the dtype, in which it would make buffers too, such as the frequencies of RoPE
        tensor_overrides=[DeepSpeedTensorOverride.device],
    )
    with no_init_weights(), sharding:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attn_implementation
        )
    model.tie_weights()
    model.eval()
    missing = _load(model, folder)
    if missing:
        raise ConfigError(
            f"model.path={path}: its files have no weights for {', '.join(sorted(missing)[:3])}"
            f"{f' and {len(missing) - 3} others' if len(missing) > 3 else ''}; give a folder that save_pretrained wrote"
        )
    return model


def folder_with_weights(path: str) -> Path:
    """Return the folder of a model with its weights; a model on the hub is downloaded once for each node."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    for suffix in ("safetensors", "bin"):
        names = [f"{stem}*.{suffix}*" for stem in ("model", "pytorch_model")]  # not copies in other formats
        folder = Path(snapshot_download(path, allow_patterns=names))
        if weight_files(folder):
            return folder
    raise ConfigError(f"model.path={path}: has neither safetensors nor bin files on the hub; choose another model")


def _load(model: PreTrainedModel, folder: Path) -> set[str]:
    """Copy the weights of the files into the shards; return the names of parameters and buffers that no file has."""
    conversions = get_model_conversion_mapping(model)
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in model.state_dict()}
    parameters = dict(model.named_parameters())  # a tied head appears once, as the embedding
    missing = {*parameters, *buffers}
    with ExitStack() as opened:
        tensors = _tensors(folder, opened)
        for names in _by_layer(tensors):
            on_disk = {name: tensors[name](dist.get_rank() == 0 or name in buffers) for name in names}
            for name, tensor in _apply_weight_conversions_to_state_dict(model, on_disk, conversions).items():
                missing.discard(name)
                if name in buffers:
                    buffers[name].copy_(tensor)
                elif name in parameters:
                    _copy(parameters[name], tensor, name, folder)
    return missing


def _copy(parameter: nn.Parameter, tensor: Tensor, name: str, folder: Path) -> None:
    from deepspeed import zero

    shape = tuple(parameter.ds_shape)  # type: ignore[attr-defined]
    if tuple(tensor.shape) != shape:
        raise ConfigError(
            f"model.path={folder}: {name} has the shape {tuple(tensor.shape)} in its file and {shape} in the model; "
            "copy the right files there"
        )
    with torch.no_grad(), zero.GatheredParameters([parameter], modifier_rank=0):
        if dist.get_rank() == 0:
            parameter.copy_(tensor)


def _tensors(folder: Path, opened: ExitStack) -> dict[str, Callable[[bool], Tensor]]:
    """Return a function for each tensor on disk: it reads the tensor, or returns one on the meta device."""
    from safetensors import safe_open

    found: dict[str, Callable[[bool], Tensor]] = {}
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            tensors = opened.enter_context(safe_open(file, framework="pt"))
            found |= {name: partial(_from_safetensors, tensors, name) for name in tensors.keys()}  # noqa: SIM118
        else:
            mapped = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
            found |= {name: partial(_from_mapping, mapped, name) for name in mapped}
    return found


def _from_safetensors(tensors: Any, name: str, read: bool) -> Tensor:
    if read:
        return torch.as_tensor(tensors.get_tensor(name))
    return torch.empty(tensors.get_slice(name).get_shape(), device="meta")


def _from_mapping(mapped: Mapping[str, Tensor], name: str, read: bool) -> Tensor:
    return mapped[name] if read else mapped[name].to("meta")


def _by_layer(names: Mapping[str, object]) -> Iterator[list[str]]:
    """Yield the names of each layer together, because some tensors in memory are made of several on disk."""
    groups: dict[str, list[str]] = {}
    for name in names:
        found = _LAYER.match(name)
        groups.setdefault(found[0] if found else name, []).append(name)
    yield from groups.values()
