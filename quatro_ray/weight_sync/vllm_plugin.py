"""Entry point of the group `vllm.general_plugins`: every vLLM process calls `register` when it starts."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal

BACKEND = "gloo"
_PR_SET_PDEATHSIG = 1
_MODULE = "quatro_ray.weight_sync.gloo"


def register() -> None:
    """Add our CPU back end to vLLM's factories; calling it again changes nothing, and vLLM does call it again.

    A process that vLLM started is also made to die with its parent, because an orphan would keep memory and devices.
    """
    if (parent := multiprocessing.parent_process()) is not None:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent.pid:  # the parent died before prctl took effect
            os.kill(os.getpid(), signal.SIGKILL)
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory

    for factory, name in (
        (WeightTransferEngineFactory, "GlooWeightTransferEngine"),
        (WeightTransferTrainerFactory, "GlooTrainerWeightTransferEngine"),
    ):
        if BACKEND not in factory._registry:
            factory.register_engine(BACKEND, _MODULE, name)
