"""Count of the tokens that an engine has sampled, updated at each engine step: it shows that the engine is alive."""

from __future__ import annotations

from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase


class TokenCounter:
    """Counts sampled tokens; pass its `factory` to AsyncLLM in `stat_loggers`."""

    def __init__(self) -> None:
        self.num_sampled_tokens = 0

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

    def log_engine_initialized(self) -> None: ...
