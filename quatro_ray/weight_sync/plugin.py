"""Entry point `vllm.general_plugins`: every vLLM process calls `register` when it starts."""

from __future__ import annotations

BACKEND = "gloo"
_MODULE = "quatro_ray.weight_sync.gloo"


def register() -> None:
    """Adds our CPU back end to vLLM's factories; safe to call again, as vLLM may."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory, WeightTransferTrainerFactory

    for factory, name in (
        (WeightTransferEngineFactory, "GlooWeightTransferEngine"),
        (WeightTransferTrainerFactory, "GlooTrainerWeightTransferEngine"),
    ):
        if BACKEND not in factory._registry:
            factory.register_engine(BACKEND, _MODULE, name)
