"""Counts what vLLM reports after each engine step: sampled tokens, the cache in use, and drafts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.metrics.loggers import StatLoggerBase


class TokenCounter:
    """Counts since the engine started; pass its `factory` to AsyncLLM in `stat_loggers`.

    Attributes:
        num_sampled_tokens: they show that the engine is alive.
        num_draft_tokens: tokens that speculative decoding proposed.
        num_accepted_tokens: those of them that were sampled.
    """

    def __init__(self) -> None:
        self.num_sampled_tokens = 0
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0
        self._usage: dict[int, float] = {}

    @property
    def kv_cache_usage(self) -> float:
        """Share of the key-value cache in use: the mean over data-parallel copies, between which vLLM balances."""
        return sum(self._usage.values()) / max(1, len(self._usage))

    def factory(self, vllm_config: Any, engine_index: int = 0) -> StatLoggerBase:
        """Return a logger that vLLM calls after each engine step and that adds to this counter."""
        from vllm.v1.metrics.loggers import StatLoggerBase

        counter = self

        class StatLogger(StatLoggerBase):
            def __init__(self) -> None: ...

            def log_engine_initialized(self) -> None: ...

            def record(
                self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
            ) -> None:
                counter._add(scheduler_stats, iteration_stats, engine_idx)

        return StatLogger()

    def _add(self, scheduler_stats: Any, iteration_stats: Any, engine_idx: int) -> None:
        if iteration_stats is not None:
            self.num_sampled_tokens += iteration_stats.num_generation_tokens
        if scheduler_stats is None:
            return
        self._usage[engine_idx] = scheduler_stats.kv_cache_usage
        if (drafts := scheduler_stats.spec_decoding_stats) is not None:
            self.num_draft_tokens += drafts.num_draft_tokens
            self.num_accepted_tokens += drafts.num_accepted_tokens
