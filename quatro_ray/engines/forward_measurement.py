"""Measures a model before anything starts, in a process of its own: whether the learner computes its log-probs.

The ranks measure again what they load, and large models and those on the hub they measure alone.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

from quatro_ray.config import Config, TinyModelConfig
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
        ConfigError: the learner's log-probs or gradients would not be those of the model, or its code fails.
    """
    if isinstance(config.model, TinyModelConfig):
        return
    folder, attention = Path(config.model.path), config.learner.attn_implementation
    if attention not in _ATTENTION_ON_CPU:
        return
    if not folder.is_dir() or (num_weights(folder) or 0) > _MAX_PARAMETERS:
        return
    # a process of its own, because the code of a model may crash, and what it loads is freed when it ends
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        measured = pool.submit(_load, config.model.path, attention)
        try:
            refusal = measured.result(timeout=_DEADLINE_S)
        except BrokenProcessPool as error:
            raise ConfigError(f"model.path={folder}: its code ends the process; choose another model") from error
        except TimeoutError as error:
            for process in (pool._processes or {}).values():
                process.kill()
            raise ConfigError(
                f"model.path={folder}: a forward pass takes more than {_DEADLINE_S:g} s; choose another model"
            ) from error
    if refusal:
        raise ConfigError(refusal)


def _load(path: str, attn_implementation: str) -> str:
    """Return why the model is refused, or an empty text."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from quatro_ray.engines.policy_loading import load_policy

    disable_progress_bar()
    torch.set_num_threads(1)
    try:
        load_policy(
            path, dtype=torch.float32, attn_implementation=attn_implementation, temperature=1.0, chunk_tokens=1024
        )
    except ConfigError as error:
        return str(error)
    return ""
