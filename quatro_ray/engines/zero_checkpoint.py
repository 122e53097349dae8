"""Checkpoints in DeepSpeed's format: reading them with any number of ranks, and what lies beside the shards."""

from __future__ import annotations

import io
import random
import shutil
import zipfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from quatro_ray.errors import CheckpointError, last_line

_MODEL = "zero_pp_rank_{}_mp_rank_00_model_states.pt"
_OPTIMIZER = "{}zero_pp_rank_{}_mp_rank_00_optim_states.pt"


def load(engine: Any, folder: Path) -> dict[str, Any]:
    """Weights, optimiser states and schedule into `engine`, a DeepSpeed engine of ZeRO-3; a collective.

    Returns:
        The client state that this rank saved; that of rank 0 where another number of ranks saved.

    Raises:
        CheckpointError: the checkpoint is not there, incomplete, or DeepSpeed refuses it.
    """
    num_saved = len(list(folder.glob(_MODEL.format("*"))))
    # together, since a rank that raised by itself would leave the others waiting in a collective
    _raise_together(folder, _defect(folder, num_saved, engine.bfloat16_enabled()))
    if num_saved == dist.get_world_size():
        return _load(engine, folder, folder)
    with _universal(folder) as converted:
        engine._config.load_universal_checkpoint = True  # of its configuration, which is read when it loads only
        try:
            state = _load(engine, converted, folder)
        finally:
            engine._config.load_universal_checkpoint = False
    for of_shard in engine.optimizer.optimizer.state.values():
        # DeepSpeed puts one counter into the state of all its sub-groups, and AdamW counts in place
        of_shard["step"] = of_shard["step"].clone()
    return state


def _load(engine: Any, source: Path, folder: Path) -> dict[str, Any]:
    """`source` is what is read, and `folder` is what errors name."""
    try:
        path, state = engine.load_checkpoint(str(source.parent), tag=source.name)
    except Exception as error:
        raise CheckpointError(f"checkpoint {folder}: DeepSpeed refuses it: {last_line(error)}") from error
    if path is None or "random_states" not in state:
        raise CheckpointError(f"checkpoint {folder}: it holds no state of a quatro_ray learner")
    return state


def _defect(folder: Path, num_saved: int, bfloat16: bool) -> str | None:
    """What is wrong with the files, as far as names and ends of files show it."""
    if not folder.is_dir():
        return "there is no such folder"
    if num_saved == 0:
        return f"it has no file {_MODEL.format('*')}"
    prefix, other = ("bf16_", "") if bfloat16 else ("", "bf16_")
    if not (folder / _OPTIMIZER.format(prefix, 0)).exists() and (folder / _OPTIMIZER.format(other, 0)).exists():
        return f"it was saved with learner.dtype {'float32' if bfloat16 else 'bfloat16'}; set the same"
    for rank in range(num_saved):
        for name in (_MODEL.format(rank), _OPTIMIZER.format(prefix, rank)):
            # torch writes zip files, whose table of contents comes last
            if not zipfile.is_zipfile(folder / name):
                return f"{name} is missing or cut off"
    return None


def _raise_together(folder: Path, defect: str | None) -> None:
    """CheckpointError on every rank if any has found a defect; a barrier as well."""
    defects: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(defects, defect)
    for rank, found in enumerate(defects):
        if found is not None:
            raise CheckpointError(f"checkpoint {folder}: {found} (rank {rank})")


@contextmanager
def _universal(folder: Path) -> Iterator[Path]:
    """The checkpoint in DeepSpeed's universal format, written by rank 0 beside `folder` and removed afterwards."""
    # the converter also writes a file beside its output, so this has a folder around it
    temporary = folder.with_name(f".{folder.name}.universal")
    converted, defect = temporary / folder.name, None
    try:
        if dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)  # of a conversion that was cut off
            try:
                _convert(folder, converted)
            except Exception as error:
                defect = f"DeepSpeed cannot convert it to another number of ranks: {last_line(error)}"
        _raise_together(folder, defect)
        yield converted
        dist.barrier()  # until all have read it
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)


def _convert(folder: Path, output: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    output.mkdir(parents=True)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # it prints its progress
        ds_to_universal.main(
            Namespace(
                input_folder=str(folder),
                output_folder=str(output),
                # one: its others would be forks of a process with threads and a device
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=False,
            )
        )


def random_states(device: torch.device) -> dict[str, Any]:
    """Of Python, NumPy and torch in this process: numbers, lists and tensors only."""
    version, internal, next_gauss = random.getstate()
    name, keys, position, has_gauss, gauss = np.random.get_state()
    states = {
        "python": [version, list(internal), next_gauss],
        "numpy": [name, list(map(int, keys)), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_states(states: dict[str, Any], device: torch.device) -> None:
    version, internal, next_gauss = states["python"]
    random.setstate((version, tuple(internal), next_gauss))
    name, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:  # a checkpoint may come from ranks on another device
        torch.cuda.set_rng_state(states["cuda"], device)
