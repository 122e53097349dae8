"""Reports of vLLM after each engine step: tokens sampled, which show that the engine is alive, and the cache in use."""

from __future__ import annotations

from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase


class TokenCounter:
    """Counts sampled tokens and keeps the cache usage; pass its `factory` to AsyncLLM in `stat_loggers`."""

    def __init__(self) -> None:
        self.num_sampled_tokens = 0
        self.kv_cache_usage = 0.0

    def factory(self, vllm_config: Any, engine_index: int = 0) -> StatLoggerBase:
        """Return a logger that vLLM calls after each engine step and that adds to this counter."""
        return _StatLogger(self)


class _StatLogger(StatLoggerBase):
    def __init__(self, counter: TokenCounter) -> None:
        self._counter = counter

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        if iteration_stats is not None:
            self._counter.num_sampled_tokens += iteration_stats.num_generation_tokens
        if scheduler_stats is not None:
            self._counter.kv_cache_usage = scheduler_stats.kv_cache_usage

    def log_engine_initialized(self) -> None: ...
