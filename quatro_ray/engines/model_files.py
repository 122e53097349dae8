"""Writes a model in Hugging Face format: new weights, and every other file of its source as it is."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from quatro_ray.errors import ConfigError

_WEIGHTS = "model.safetensors"
_SUFFIXES_OF_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
    ".index.json",
)
"""Files that hold weights of the source, or list them."""


def write_model(path: Path, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Write weights, and copy configuration, generation configuration, tokenizer and chat template.

    Args:
        path: folder to write, which is created if it does not exist.
        state: whole tensors by their names on disk.
        source: folder or hub name of the starting policy.

    Raises:
        OSError: a file cannot be read or written.
    """
    from safetensors.torch import save_file

    path.mkdir(parents=True, exist_ok=True)
    dtype = next(iter(state.values())).dtype
    copy_files(_folder(source), path, str(dtype).removeprefix("torch."))
    save_file({k: v.contiguous() for k, v in state.items()}, path / _WEIGHTS, metadata={"format": "pt"})


def check_files(source: str | Path) -> None:
    """Try what `write_model` does with the files of a model, before any step is trained.

    Raises:
        ConfigError: a file cannot be copied, or config.json is not a JSON object.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            copy_files(_folder(source), Path(folder), "float32")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"model.path={source}: its files cannot be copied, as each export does ({error}); correct them"
            ) from error


def copy_files(source: Path, path: Path, dtype: str) -> None:
    """Copy all files but weights; config.json names the dtype of the new weights.

    Args:
        source: folder of a model.
        path: an existing folder.
        dtype: such as "bfloat16".

    Raises:
        OSError: a file cannot be read or written.
        ValueError: config.json is not a JSON object.
    """
    for file in source.iterdir():
        if file.is_file() and not file.name.startswith(".") and not file.name.endswith(_SUFFIXES_OF_WEIGHTS):
            shutil.copyfile(file, path / file.name)
    config = json.loads((path / "config.json").read_text())
    if not isinstance(config, dict):
        raise ValueError(f"{source / 'config.json'} is not a JSON object")
    config.pop("torch_dtype", None)  # its name before transformers 5
    (path / "config.json").write_text(json.dumps(config | {"dtype": dtype}, indent=2) + "\n")


def _folder(source: str | Path) -> Path:
    """Return the folder of a model; that of one on the hub is where transformers has put it."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(source), ignore_patterns=[f"*{suffix}" for suffix in _SUFFIXES_OF_WEIGHTS]))
