"""LoRA adapters of the policy, made by peft: which layers have one, how they are merged, and their files.

Shape letters: I inputs and O outputs of a linear layer, R rank of its adapter A [R, I], B [O, R].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from quatro_ray.config.lora import LoraConfig
from quatro_ray.errors import ConfigError

if TYPE_CHECKING:
    from peft.tuners.lora import Linear as AdaptedLinear

_ADAPTER = "default"
"""peft's name of the adapter, which is part of the names of its parameters."""
_A, _B = f".lora_A.{_ADAPTER}.weight", f".lora_B.{_ADAPTER}.weight"
ADAPTER_FOLDER = "adapter"
"""Name of the folder of the adapters in an export."""
_BASE = ".base_layer."
_MEASURED_SHARE = 0.1
"""Size of random adapters, relative to the weights that they change."""

Forward = Callable[..., tuple[Tensor, Tensor]]
"""A forward pass of the policy, as PolicyModel.forward."""


class Adapters:
    """The adapters of a model. All other parameters of it are frozen.

    An adapter starts with B = 0, so that it changes nothing. The model may be sharded by ZeRO-3 already.

    Args:
        model: a model from transformers, with its own head; its target layers are replaced.
        lora: rank, factor and target layers.

    Raises:
        ConfigError: a name in `target_modules` fits no linear layer of the model, the rank exceeds the width of a
            target, or peft refuses the model.
    """

    def __init__(self, model: PreTrainedModel, lora: LoraConfig) -> None:
        import peft

        targets = _targets(model, lora)
        self._config = peft.LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            use_rslora=lora.use_rslora,
            target_modules=targets,
            task_type="CAUSAL_LM",
        )
        self._scale = lora.scale
        try:
            peft.inject_adapter_in_model(self._config, model, _ADAPTER)
        except (ValueError, TypeError, NotImplementedError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"learner.lora.target_modules: peft refuses this model ({reason}); choose other layers, or leave "
                "learner.lora out"
            ) from error
        self._layers: dict[str, AdaptedLinear] = {
            name: module for name, module in model.named_modules() if type(module) is peft.tuners.lora.Linear
        }
        assert sorted(self._layers) == sorted(targets), "peft has put an adapter elsewhere"

    def merge(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of a layer under the model's own names, with W + scale·B·A, summed in float32, for W.

        Args:
            state: whole tensors of at least one layer by their names in memory, adapters among them; or all of them on
                the meta device.
        """
        merged: dict[str, Tensor] = {}
        for name, tensor in state.items():
            layer = name.removesuffix(f"{_BASE}weight")
            if layer != name:
                merged[f"{layer}.weight"] = self._added(layer, tensor, state[layer + _A], state[layer + _B])
            elif not is_adapter(name):
                merged[name.replace(_BASE, ".")] = tensor
        return merged

    def _added(self, layer: str, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        change = self._scale * (b.float() @ a.float())
        return (weight.float() + (change.T if self._layers[layer].fan_in_fan_out else change)).to(weight.dtype)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Compute without the adapters. Their layers still run, so that ZeRO-3 gathers the same as always."""
        for layer in self._layers.values():
            layer.set_scale(_ADAPTER, 0)
        try:
            yield
        finally:
            for layer in self._layers.values():
                layer.set_scale(_ADAPTER, 1)

    def without(self, forward: Forward) -> Forward:
        """Return a forward pass of the starting policy, which takes no memory of its own."""

        def starting_policy(*inputs: Tensor) -> tuple[Tensor, Tensor]:
            with self.off():
                return forward(*inputs)

        return starting_policy

    @torch.no_grad()
    def _randomise(self) -> None:
        """Set B to random numbers, so that each adapter changes its weight by a tenth of its size."""
        random = torch.Generator().manual_seed(0)
        for layer in self._layers.values():
            a, b = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
            b.copy_(torch.randn(b.shape, generator=random))
            change = self._scale * (b.float() @ a.float()).norm()
            b.mul_(_MEASURED_SHARE * layer.base_layer.weight.float().norm() / change)

    @torch.no_grad()
    def reset(self) -> None:
        """Set B to 0; not if sharded."""
        for layer in self._layers.values():
            layer.lora_B[_ADAPTER].weight.zero_()

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Give the adapters random values, and compute with weights that contain them, as engines do; not if sharded.

        Afterwards the adapters have these values, and the weights are as before.
        """
        self._randomise()
        before = {name: layer.base_layer.weight.detach().clone() for name, layer in self._layers.items()}
        with torch.no_grad():
            for name, layer in self._layers.items():
                a, b = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
                layer.base_layer.weight.copy_(self._added(name, layer.base_layer.weight, a, b))
        try:
            with self.off():
                yield
        finally:
            with torch.no_grad():
                for name, layer in self._layers.items():
                    layer.base_layer.weight.copy_(before[name])

    def write(self, path: Path, state: Mapping[str, Tensor], base_model: str) -> None:
        """Write the adapters in peft's format, which peft and vLLM load.

        Args:
            path: folder to write, which is created if it does not exist.
            state: whole tensors of the adapters, as `peft_names` returns them.
            base_model: folder or hub name of the starting policy.

        Raises:
            OSError: a file cannot be written.
        """
        from safetensors.torch import save_file

        path.mkdir(parents=True, exist_ok=True)
        self._config.base_model_name_or_path = base_model
        self._config.target_modules = sorted(self._config.target_modules)
        self._config.save_pretrained(path, auto_mapping_dict=None)
        save_file(dict(state), path / "adapter_model.safetensors", metadata={"format": "pt"})


def is_adapter(name: str) -> bool:
    """Return whether a parameter with this name is part of an adapter."""
    return name.endswith((_A, _B))


def peft_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of adapters under their names in peft's files, and no others."""
    return {
        f"base_model.model.{name.replace(f'.{_ADAPTER}.weight', '.weight')}": tensor.contiguous()
        for name, tensor in state.items()
        if is_adapter(name)
    }


def untrained(path: str, lora: LoraConfig) -> dict[str, Tensor]:
    """Return adapters that change nothing, under their names in peft's files. No weights of the model are loaded.

    Args:
        path: folder or hub name of the model.
        lora: rank and target layers.

    Raises:
        ConfigError: the model cannot have these adapters.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    Adapters(model, lora)
    return {name: torch.zeros(tensor.shape) for name, tensor in peft_names(model.state_dict()).items()}


def _targets(model: PreTrainedModel, lora: LoraConfig) -> list[str]:
    """Return the names of the layers that get an adapter. Raises ConfigError if a name fits none, or one is narrow."""
    head: Any = model.get_output_embeddings()
    linear: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    wanted = [""] if lora.target_modules == "all-linear" else lora.target_modules
    chosen: dict[str, nn.Module] = {}
    for target in wanted:
        fitting = {
            name: module for name, module in linear.items() if f".{name}".endswith(f".{target}" if target else "")
        }
        if not fitting:
            ends = sorted({name.rpartition(".")[2] for name in linear})
            raise ConfigError(
                f"learner.lora.target_modules: {target or 'all-linear'} fits no linear layer of the model; choose from "
                f"{', '.join(ends) or 'none'}"
            )
        chosen |= fitting
    for name, module in chosen.items():
        width = min(_features(module))
        if lora.rank > width:
            raise ConfigError(
                f"learner.lora.rank={lora.rank}: must be at most {width}, the width of {name}; lower it, or list "
                "target_modules without that layer"
            )
    return list(chosen)


def _features(module: nn.Module) -> tuple[int, int]:
    """Return the numbers of inputs and outputs of a linear layer, whose weight may be sharded."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    shape: Any = getattr(module.weight, "ds_shape", module.weight.shape)
    return int(shape[0]), int(shape[1])
