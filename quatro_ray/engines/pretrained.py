"""Checks of the model before anything starts: whether its tokenizer loads, and whether it can be trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from quatro_ray.config import Config, TinyModelConfig
from quatro_ray.engines.tiny_tokenizer import MAX_POSITIONS, make_tokenizer
from quatro_ray.engines.weight_files import check_weights
from quatro_ray.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or the hub.

    Raises:
        ConfigError: there is none, or it does not load.
    """
    from transformers import AutoTokenizer

    check_exists(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise _not_loaded(path, error) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # some classes load from a folder without their files
        raise ConfigError(
            f"model.path={path}: has no tokenizer (its vocabulary has {len(tokenizer)} tokens); copy the tokenizer's "
            "files there, such as tokenizer.json"
        )
    return tokenizer


def bos_token_of(config: Config) -> object:
    """Return the BOS token that the model's configuration names, or None if it names none."""
    if isinstance(config.model, TinyModelConfig):
        return None
    return getattr(load_model_config(config.model.path), "bos_token_id", None)


def check_exists(path: str) -> None:
    """Raise ConfigError if the text can only be a folder, not a name on the hub, and there is no such folder."""
    may_be_a_name = path.count("/") <= 1 and not path.startswith(("/", ".", "~"))
    if not may_be_a_name and not Path(path).is_dir():
        raise ConfigError(
            f"model.path={path}: cannot be loaded (there is no such folder); give a folder or a name on the hub"
        )


def check_folder(config: Config) -> None:
    """Raise ConfigError if the model is a folder without complete weights; those on the hub are not looked at."""
    if not isinstance(config.model, TinyModelConfig) and Path(config.model.path).is_dir():
        check_weights(Path(config.model.path))


def check_division(config: Config) -> None:
    """Raise ConfigError if the layers or heads cannot be divided among the devices that are to share them."""
    if isinstance(config.model, TinyModelConfig):
        layers: int | None = config.model.num_layers
        heads: int | None = config.model.num_heads
        key_heads: int | None = max(1, config.model.num_heads // 2)
    else:
        model = load_model_config(config.model.path)
        layers = getattr(model, "num_hidden_layers", None)
        heads = getattr(model, "num_attention_heads", None)
        key_heads = getattr(model, "num_key_value_heads", None)
    stages = config.generator.pipeline_parallel_size
    if isinstance(layers, int) and stages > layers:
        raise ConfigError(
            f"generator.pipeline_parallel_size={stages}: must be at most the model's {layers} layers; lower it"
        )
    for name, size in (
        ("generator.tensor_parallel_size", config.generator.tensor_parallel_size),
        ("learner.sequence_parallel_size", config.learner.sequence_parallel_size),
    ):
        if isinstance(heads, int) and heads % size:
            raise ConfigError(f"{name}={size}: must divide the model's {heads} attention heads; choose a divisor")
        if isinstance(key_heads, int) and key_heads % size and size % key_heads:
            raise ConfigError(
                f"{name}={size}: must divide the model's {key_heads} key-value heads, or be a multiple of them; choose "
                "another"
            )


def load_model_config(path: str, *, from_hub: bool = True) -> PretrainedConfig:
    """Return the configuration of a model's language part.

    Args:
        path: folder or name on the hub.
        from_hub: whether to ask the hub. If not, a name on it must have been loaded on this machine before.

    Raises:
        ConfigError: it does not load.
    """
    from transformers import AutoConfig

    check_exists(path)
    try:
        return AutoConfig.from_pretrained(path, local_files_only=not from_hub).get_text_config()
    except (OSError, ValueError) as error:
        raise _not_loaded(path, error) from error


def tokenizer_of(config: Config) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the model to train; that of a tiny model exists before the model does."""
    if isinstance(config.model, TinyModelConfig):
        return make_tokenizer()
    return load_tokenizer(config.model.path)


def check_positions(config: Config) -> None:
    """Check that prompt and response fit the model's positions.

    Whether the learner's log-probs are the model's own is measured (engines/forward_measurement.py).

    Raises:
        ConfigError: the model does not load, or they do not fit.
    """
    if isinstance(config.model, TinyModelConfig):
        return _check_positions(config, MAX_POSITIONS)
    path = config.model.path
    model = load_model_config(path)
    if "factor" not in (getattr(model, "rope_parameters", None) or {}):  # with a factor, RoPE stretches the positions
        _check_positions(config, getattr(model, "max_position_embeddings", None))


def _check_positions(config: Config, limit: int | None) -> None:
    generator = config.generator
    longest = generator.max_prompt_tokens + generator.max_response_tokens
    if limit is not None and longest > limit:
        raise ConfigError(
            f"generator.max_prompt_tokens={generator.max_prompt_tokens} and max_response_tokens="
            f"{generator.max_response_tokens} together exceed the {limit} positions of the model; lower one of the two"
        )


def _not_loaded(path: str, error: Exception) -> ConfigError:
    reason = str(error).strip().splitlines()[0]
    return ConfigError(f"model.path={path}: cannot be loaded ({reason}); give a folder or a name on the hub")
