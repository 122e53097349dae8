"""The sizes of a model that its activations depend on. Loads neither torch nor weights."""

from __future__ import annotations

from dataclasses import dataclass

from quatro_ray.config import Config, TinyModelConfig


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a transformer."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int


def model_shape(config: Config) -> ModelShape:
    """Return the sizes of the model that is trained, without asking the hub.

    Raises:
        ConfigError: the configuration of a pretrained model is not on this machine, or does not load.
    """
    model = config.model
    if isinstance(model, TinyModelConfig):
        return ModelShape(model.num_layers, model.hidden_size, 4 * model.hidden_size, 258)
    # imported here, because the controller needs transformers only if engines and ranks share GPUs
    from quatro_ray.engines.pretrained import load_model_config

    found = load_model_config(model.path, from_hub=False)
    hidden: int = found.hidden_size
    intermediate = getattr(found, "intermediate_size", None) or 4 * hidden
    return ModelShape(found.num_hidden_layers, hidden, intermediate, found.vocab_size)
