"""Measures a model before anything starts, in a process of its own: whether the learner computes its log-probs.

The ranks measure again what they load, and large models and those on the hub they measure alone. Whether a model can
have the adapters of the run is known beforehand for all.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from quatro_ray.config import Config, LoraConfig, ModelConfig, PretrainedModelConfig, TinyModelConfig
from quatro_ray.engines.weight_files import num_weights
from quatro_ray.errors import ConfigError

_MAX_PARAMETERS = 1_000_000_000
"""So that the measurement takes less than a minute and 10 GiB on a laptop."""
_DEADLINE_S = 300.0
_ATTENTION_ON_CPU = ("auto", "varlen", "sdpa", "eager")
"""Others need a GPU, which the machine that starts the run may not have."""


def measure_forward(config: Config) -> None:
    """Measure a model that lies in a folder, unless it is large.

    Raises:
        ConfigError: the learner's log-probs or gradients would not be those of the model, its code fails, or it cannot
            have the adapters of the run.
    """
    model, learner = config.model, config.learner
    if _can_be_measured(config):
        assert isinstance(model, PretrainedModelConfig)
        _ask(partial(_load, model.path, learner.attn_implementation, learner.lora), model.path)
    elif learner.lora is not None:
        name = model.path if isinstance(model, PretrainedModelConfig) else "tiny"
        _ask(partial(_adapt, model, learner.lora), name)


def _can_be_measured(config: Config) -> bool:
    if isinstance(config.model, TinyModelConfig) or config.learner.attn_implementation not in _ATTENTION_ON_CPU:
        return False
    folder = Path(config.model.path)
    return folder.is_dir() and (num_weights(folder) or 0) <= _MAX_PARAMETERS


def _ask(refusal_of: Callable[[], str], name: str) -> None:
    """Raise ConfigError with the text that the function returns, unless it is empty."""
    # a process of its own, because the code of a model may crash, and what it loads is freed when it ends
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        measured = pool.submit(refusal_of)
        try:
            refusal = measured.result(timeout=_DEADLINE_S)
        except BrokenProcessPool as error:
            raise ConfigError(f"model.path={name}: its code ends the process; choose another model") from error
        except TimeoutError as error:
            for process in (pool._processes or {}).values():
                process.kill()
            raise ConfigError(
                f"model.path={name}: a forward pass takes more than {_DEADLINE_S:g} s; choose another model"
            ) from error
    if refusal:
        raise ConfigError(refusal)


def _load(path: str, attn_implementation: str, lora: LoraConfig | None) -> str:
    """Return why the model is refused, or an empty text."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from quatro_ray.engines.policy_loading import load_policy

    disable_progress_bar()
    torch.set_num_threads(1)
    try:
        load_policy(
            path,
            dtype=torch.float32,
            attn_implementation=attn_implementation,
            temperature=1.0,
            chunk_tokens=1024,
            lora=lora,
        )
    except ConfigError as error:
        return str(error)
    return ""


def _adapt(model: ModelConfig, lora: LoraConfig) -> str:
    """Return why a model cannot have these adapters, or an empty text; no weights are loaded."""
    from quatro_ray.engines.lora import Adapters, untrained
    from quatro_ray.engines.tiny_model import make_model
    from quatro_ray.engines.tiny_tokenizer import make_tokenizer

    try:
        if isinstance(model, TinyModelConfig):
            Adapters(make_model(model, make_tokenizer(), 0), lora)
        else:
            untrained(model.path, lora)
    except ConfigError as error:
        return str(error)
    return ""
