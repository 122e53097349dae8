"""The `generator` section: the pool of vLLM engines that sample rollouts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, field_validator

from quatro_ray.config.base import Accepts, Section
from quatro_ray.config.engine_args import refused

CPU_KV_CACHE_GIB = 1.0
"""Size of the key-value cache of an engine on CPU if kv_cache_gib is null."""


class GeneratorConfig(Section):
    """The pool of vLLM engines that sample rollouts."""

    num_engines: int = Field(1, ge=1)
    """vLLM engines that sample for training. Raise it if the learner waits for groups."""
    max_engines: int | None = Field(None, ge=1)
    """Largest number of engines. The pool grows to it during the run, when the cluster has room for one more or an
    autoscaler adds a node. null: num_engines."""
    tensor_parallel_size: int = Field(1, ge=1)
    """Devices that share each layer of the model. Raise it if the model does not fit on one."""
    pipeline_parallel_size: int = Field(1, ge=1)
    """Stages of layers, each on tensor_parallel_size devices. For models whose heads cannot be divided further."""
    data_parallel_size: int = Field(1, ge=1)
    """Copies of an engine that share its requests, each on its own devices. For mixtures of experts, whose experts
    `engine_args: {enable_expert_parallel: true}` divides among all of them; else raise num_engines."""
    temperature: float = Field(1.0, ge=0.01, le=2)
    """Sampling temperature of rollouts. The learner divides its logits by the same value, so ratios stay exact."""
    top_p: Annotated[float, Accepts("1")] = Field(1.0, gt=0, le=1)
    """Must be 1: importance ratios need the full distribution. For evaluation set evaluation.top_p."""
    max_prompt_tokens: int = Field(ge=1)
    """Longest prompt, in tokens. Rows with a longer one are treated as data.bad_rows says."""
    max_response_tokens: int = Field(ge=1)
    """Longest response, in tokens; generation stops there with finish reason `length`."""
    max_num_seqs: int = Field(64, ge=1)
    """Sequences that one engine decodes at the same time. Lower it if the key-value cache overflows."""
    max_groups_in_flight: int = Field(16, ge=1)
    """Groups handed to one engine at the same time; more keep it full across weight updates."""
    max_kv_cache_usage: float = Field(0.9, gt=0, le=1)
    """Share of an engine's key-value cache above which it gets no new group, until running ones have ended."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Number format of the engines' weights and activations. float32 keeps engine and learner log-probabilities
    closest, and suits CPUs."""
    gpu_memory_utilization: float = Field(0.85, gt=0, lt=1)
    """Share of a GPU's memory that must be free when an engine starts, and that it takes if kv_cache_gib is null
    (ignored on CPU)."""
    kv_cache_gib: float | None = Field(None, gt=0)
    """Size of an engine's key-value cache, GiB on each of its devices. null: 1 GiB on CPU, and on GPUs what
    gpu_memory_utilization leaves."""
    max_num_batched_tokens: int | None = Field(None, ge=1)
    """Tokens that one engine computes in one step; prompts longer than that take several. null: 8,192 on GPUs, vLLM's
    default on CPU."""
    deterministic: bool = False
    """Sample one sequence at a time without prefix cache, so the same seed gives the same bits. Slow; for tests."""
    engine_args: dict[str, object] = Field({}, repr=False)
    """Further vLLM AsyncEngineArgs by name; those that quatro_ray sets or cannot serve are refused."""
    start_deadline_s: float = Field(600, gt=0)
    """Seconds within which an engine must load the model and be ready. Raise it for large models or slow disks."""
    sleep_deadline_s: float = Field(60, gt=0)
    """Seconds within which an engine must free its GPU for the learner, and again to take it back, if
    cluster.colocate_mode is alternating."""
    group_deadline_s: float = Field(600, gt=0)
    """Seconds within which one group must be generated. Raise it for long responses."""
    max_retries: int = Field(1, ge=0)
    """Retries of a group whose generation failed; after the last one the group is dropped."""
    progress_deadline_s: float = Field(120, gt=0)
    """Seconds after which an engine that has requests and samples no token is killed and restarted."""
    max_restarts: int = Field(5, ge=0)
    """Consecutive restarts of an engine before it is given up, with doubling delays. A minute of health resets the
    count."""
    min_engines: int = Field(1, ge=1)
    """Engines that must be left for the run to continue after others were given up."""
    max_engines_lost: int = Field(2, ge=1)
    """A group on which more engines than this have died is dropped as `quarantined`."""

    @property
    def max_num_engines(self) -> int:
        """Engines that there may be at one time."""
        return self.num_engines if self.max_engines is None else self.max_engines

    @property
    def devices_per_engine(self) -> int:
        """Devices of one engine, all on one node; each has a worker that receives the weights."""
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.data_parallel_size

    @field_validator("top_p")
    @classmethod
    def _samples_the_full_distribution(cls, top_p: float) -> float:
        if top_p != 1:
            raise ValueError(
                "must be 1: importance ratios compare the learner's policy with the one that sampled, and a token that "
                "top-p cuts off has no ratio; set evaluation.top_p instead"
            )
        return top_p

    def broken_rules(self) -> Iterator[str]:
        """Yield a line for each broken rule about the number of engines and engine_args."""
        if self.min_engines > self.num_engines:
            yield f"min_engines={self.min_engines} must be at most num_engines={self.num_engines}: lower it"
        if self.max_engines is not None and self.max_engines < self.num_engines:
            yield f"max_engines={self.max_engines} must be at least num_engines={self.num_engines}: raise it"
        for name in ("num_engines", "max_engines", "data_parallel_size"):
            if self.deterministic and (number := getattr(self, name) or 1) > 1:
                yield (
                    f"deterministic=true needs {name}=1, not {number}: with several engines, timing decides which one "
                    f"takes a group; set {name} to 1"
                )
        yield from refused(self.engine_args)
