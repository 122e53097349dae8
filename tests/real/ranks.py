"""Two processes that form a group, for tests of what ranks do together without Ray."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers

DEADLINE_S = 240


def on_two_ranks(work: Callable[[Path], Any], folder: Path) -> list[Any]:
    """Call the function in two processes that form a group."""
    with pytest.MonkeyPatch.context() as patch, ProcessPoolExecutor(2, get_context("spawn")) as pool:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # bytes; memory of larger tensors returns when they are freed
        calls = [pool.submit(_join, work, folder, rank) for rank in range(2)]
        return [call.result(timeout=DEADLINE_S) for call in calls]


def _join(work: Callable[[Path], Any], folder: Path, rank: int) -> Any:
    import deepspeed

    os.environ["LOCAL_RANK"] = "0"
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_init_required=False)
    try:
        return work(folder)
    finally:
        dist.destroy_process_group()
