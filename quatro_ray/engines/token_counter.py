"""How many tokens an engine has sampled so far, told at every one of its steps: the sign that it is not hung."""

from __future__ import annotations

from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase


class TokenCounter:
    """`factory` is what AsyncLLM takes in `stat_loggers`."""

    def __init__(self) -> None:
        self.num_sampled_tokens = 0

    def factory(self, vllm_config: Any, engine_index: int = 0) -> StatLoggerBase:
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
