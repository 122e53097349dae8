"""Checkpoints in DeepSpeed's format: loading with any number of ranks, and the state stored beside the shards."""

from __future__ import annotations

import io
import random
import shutil
import zipfile
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from quatro_ray.engines.zero_engine import ZeroEngine
from quatro_ray.errors import CheckpointError, last_line

_MODEL = "zero_pp_rank_{}_mp_rank_00_model_states.pt"
_OPTIMIZER = "{}zero_pp_rank_{}_mp_rank_00_optim_states.pt"


class RandomStates(TypedDict):
    """Random states of a process, as numbers, lists and tensors only."""

    python: list[Any]
    numpy: list[Any]
    torch: Tensor
    cuda: NotRequired[Tensor]


class ClientState(TypedDict):
    """State that a rank stores in a checkpoint in addition to DeepSpeed's own."""

    version: int
    step_control_kept: float
    entropy_coef: NotRequired[float]  # missing in checkpoints that were saved before there was a target
    random_states: RandomStates


def load(engine: ZeroEngine, folder: Path) -> ClientState:
    """Load weights, optimiser states and schedule into `engine`; a collective.

    Returns:
        The client state that this rank saved; that of rank 0 if another number of ranks saved.

    Raises:
        CheckpointError: the checkpoint is missing or incomplete, or DeepSpeed refuses it.
    """
    num_saved = len(list(folder.glob(_MODEL.format("*"))))
    # all ranks raise together: one that raised by itself would leave the others waiting in a collective
    _raise_together(folder, _defect(folder, num_saved, engine.bfloat16_enabled()))
    if num_saved == dist.get_world_size():
        return _load(engine, folder, folder)
    with _universal(folder) as converted:
        engine._config.load_universal_checkpoint = True  # DeepSpeed reads this setting only while it loads
        try:
            state = _load(engine, converted, folder)
        finally:
            engine._config.load_universal_checkpoint = False
    for shard_state in engine.optimizer.optimizer.state.values():
        # DeepSpeed shares one counter among the states of all its sub-groups, and AdamW counts in place
        shard_state["step"] = shard_state["step"].clone()
    return state


def _load(engine: ZeroEngine, source: Path, folder: Path) -> ClientState:
    """Read the checkpoint in `source`; errors name `folder`, the one that the user knows."""
    try:
        path, loaded = engine.load_checkpoint(str(source.parent), tag=source.name, custom_load_fn=_load_trained)
    except Exception as error:
        raise CheckpointError(f"checkpoint {folder}: DeepSpeed refuses it: {last_line(error)}") from error
    if path is None or "random_states" not in loaded:
        raise CheckpointError(f"checkpoint {folder}: it holds no state of a quatro_ray learner")
    state: ClientState = loaded
    return state


def _load_trained(src: dict[str, Tensor], dst: nn.Module) -> None:
    """Load a module's state, in which only frozen parameters may be missing.

    Raises:
        RuntimeError: the state is of another module.
    """
    missing, unexpected = dst.load_state_dict(src, strict=False)
    frozen = {name for name, parameter in dst.named_parameters(remove_duplicate=False) if not parameter.requires_grad}
    if strangers := [*unexpected, *(set(missing) - frozen)]:
        raise RuntimeError(f"it is of another model: {', '.join(sorted(strangers)[:3])}")


def _defect(folder: Path, num_saved: int, bfloat16: bool) -> str | None:
    """Return what is wrong with the files, judging by their names and last bytes alone; None if nothing is."""
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
    """Raise CheckpointError on every rank if any has found a defect; also a barrier."""
    defects: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(defects, defect)
    for rank, found in enumerate(defects):
        if found is not None:
            raise CheckpointError(f"checkpoint {folder}: {found} (rank {rank})")


@contextmanager
def _universal(folder: Path) -> Iterator[Path]:
    """Provide the checkpoint in DeepSpeed's universal format, written by rank 0 beside `folder` and removed after."""
    # the converter also writes a file beside its output, hence a folder around it
    temporary = folder.with_name(f".{folder.name}.universal")
    converted, defect = temporary / folder.name, None
    try:
        if dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)  # left by a conversion that was killed
            try:
                _convert(folder, converted)
            except Exception as error:
                defect = f"DeepSpeed cannot convert it to another number of ranks: {last_line(error)}"
        _raise_together(folder, defect)
        yield converted
        dist.barrier()  # until all ranks have read it
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)


def _convert(folder: Path, output: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    output.mkdir(parents=True)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # the converter prints its progress
        ds_to_universal.main(
            Namespace(
                input_folder=str(folder),
                output_folder=str(output),
                # one worker runs in this process; more would be forks of a process with threads and a device
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=False,
            )
        )


def random_states(device: torch.device) -> RandomStates:
    """Return the states of Python's, NumPy's and torch's generators in this process."""
    version, internal, next_gauss = random.getstate()
    name, keys, position, has_gauss, gauss = np.random.get_state()
    states = RandomStates(
        python=[version, list(internal), next_gauss],
        numpy=[name, list(map(int, keys)), position, has_gauss, gauss],
        torch=torch.get_rng_state(),
    )
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_states(states: RandomStates, device: torch.device) -> None:
    """Set the generators of this process to states that `random_states` returned."""
    version, internal, next_gauss = states["python"]
    random.setstate((version, tuple(internal), next_gauss))
    name, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:  # a checkpoint may come from ranks on another device
        torch.cuda.set_rng_state(states["cuda"], device)
