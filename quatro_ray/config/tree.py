"""The sections of the configuration, and the rules that span them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from quatro_ray.config.base import Section
from quatro_ray.config.data import DataConfig, FilterConfig, SourceConfig
from quatro_ray.config.environments import EnvironmentConfig
from quatro_ray.config.model import ModelConfig, TinyModelConfig
from quatro_ray.config.objectives import ObjectiveConfig
from quatro_ray.config.rewards import CodeRewardConfig, EnvironmentRewardConfig, RewardConfig
from quatro_ray.config.run import CheckpointConfig, ClusterConfig, EvaluationConfig, RunConfig, TelemetryConfig


class GeneratorConfig(Section):
    """The pool of vLLM engines."""

    num_engines: int = Field(1, ge=1)
    tensor_parallel_size: int = Field(1, ge=1)
    """Devices per engine."""
    temperature: float = Field(1.0, ge=0.01, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    """1, and nothing else: evaluation has its own."""
    max_prompt_tokens: int = Field(ge=1)
    max_response_tokens: int = Field(ge=1)
    max_num_seqs: int = Field(64, ge=1)
    """Sequences that one engine decodes at the same time."""
    max_groups_in_flight: int = Field(16, ge=1)
    """Groups handed to one engine at the same time; more keep it full across weight updates."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    gpu_memory_utilization: float = Field(0.85, gt=0, lt=1)
    """Share of a GPU for an engine (ignored on CPU)."""
    kv_cache_gib: float = Field(1.0, gt=0)
    """Key-value cache of an engine on CPU, GiB (ignored on GPUs)."""
    deterministic: bool = False
    """One sequence at a time and no prefix cache: the same seed gives the same bits. Slow; for tests."""
    engine_args: dict[str, Any] = Field({})
    """Further vLLM AsyncEngineArgs by name; those that quatro_ray sets itself are refused."""
    start_deadline_s: float = Field(600, gt=0)
    group_deadline_s: float = Field(600, gt=0)
    """One group must be finished by then."""
    max_retries: int = Field(1, ge=0)
    """Further tries for a group whose generation failed; then it is dropped."""
    progress_deadline_s: float = Field(120, gt=0)
    """An engine that has requests and samples no token for so long is killed and started again."""
    max_restarts: int = Field(5, ge=0)
    """Restarts of an engine in a row, the delays between them doubling; a minute of health ends the row."""
    min_engines: int = Field(1, ge=1)
    """The run goes on with so many engines where others cannot be started again."""
    max_engines_lost: int = Field(2, ge=1)
    """A group on which more engines than that have died is dropped as `quarantined`."""

    @field_validator("top_p")
    @classmethod
    def _samples_the_whole_policy(cls, top_p: float) -> float:
        if top_p != 1:
            raise ValueError(
                f"{top_p:g} must be 1: importance ratios compare the learner's policy with the one that sampled, and "
                "what top-p cuts off has no ratio; set it in evaluation.top_p alone"
            )
        return top_p

    @model_validator(mode="after")
    def _enough_engines(self) -> GeneratorConfig:
        if self.min_engines > self.num_engines:
            raise ValueError(f"min_engines={self.min_engines} exceeds num_engines={self.num_engines}: lower it")
        return self

    @model_validator(mode="after")
    def _reserved(self) -> GeneratorConfig:
        own = {
            "model", "tokenizer", "dtype", "seed", "tensor_parallel_size", "max_num_seqs", "max_model_len",
            "gpu_memory_utilization", "logprobs_mode", "weight_transfer_config", "enable_prefix_caching",
            "kv_cache_memory_bytes", "hf_token",
        }  # fmt: skip
        if taken := sorted(own & self.engine_args.keys()):
            raise ValueError(
                f"engine_args may not contain {taken}: quatro_ray sets them from its own fields, and a token belongs "
                "into the environment (HF_TOKEN)"
            )
        return self


class VerifierConfig(Section):
    """The pool that scores rollouts: actors that own worker processes, which are killed when they miss a deadline."""

    num_actors: int = Field(1, ge=1)
    """Spread over the nodes by Ray."""
    num_workers: int = Field(2, ge=1)
    """Worker processes of each actor."""
    deadline_s: float = Field(10, gt=0)
    """For one response; one that misses it is judged again, alone in a fresh process."""
    group_deadline_s: float = Field(300, gt=0)
    """For a whole group, waiting for a free worker included; an actor that misses it is replaced."""
    start_deadline_s: float = Field(120, gt=0)
    """A new actor or process must run by then; this does not count against what it scores."""
    memory_mib: int = Field(2048, ge=256)
    """Address space of a worker process."""
    recycle_after: int = Field(2000, ge=1)
    """Responses that a worker judges before it is replaced."""
    max_retries: int = Field(1, ge=0)
    """Further tries where the machinery failed; then the group is dropped with that reason."""
    exhausted_reward: float = 0.0
    """Reward of a response that used up its limits twice."""


class ReplayConfig(Section):
    """The asynchronous buffer between generators and learner."""

    groups_per_step: int = Field(ge=1)
    """B: queries of one optimiser step."""
    group_size: int = Field(ge=2)
    """G: rollouts of a query (n_samples_per_prompt elsewhere)."""
    max_staleness: int = Field(ge=0)
    """Learner version minus token version may be at most this, in optimiser steps. 0: synchronous."""
    on_stale: Literal["drop", "train"] = "drop"
    """A straggler beyond the cap at lease time: drop it with a reason, or train on it all the same."""
    deadline_s: float = Field(120, gt=0)
    """For each answer of the buffer."""


AggregationMode = Literal["token_mean", "seq_mean_token_sum", "seq_mean_token_mean", "seq_mean_token_sum_norm"]


class StepControlConfig(Section):
    """After the optimiser's step, moves the weights back along it where the policy changed by more than its budget."""

    window_kl_nats_per_token: float | None = Field(0.06, gt=0)
    """ε_window: KL(π_k ‖ π_k+1) per token of one step may be ε_window/(1 + staleness). null: no control."""
    max_kl_nats_per_token: float = Field(4e-4, gt=0)
    """However fresh its samples, one step may move the policy by no more."""
    probe_share: float = Field(0.125, gt=0, le=1)
    """Share of the step's tokens on which the KL is measured; a pass without gradient over them is its cost."""


class LearnerConfig(Section):
    """The DeepSpeed ZeRO-3 group."""

    num_ranks: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    num_warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.95, ge=0, lt=1)
    max_grad_norm: float = Field(1.0, gt=0)
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    tokens_per_micro_batch: int = Field(ge=1)
    """Prompt and response tokens in one packed row; must hold the longest rollout."""
    logprob_chunk_tokens: int = Field(1024, ge=1)
    """Tokens whose logits exist at the same time."""
    loss_agg_mode: AggregationMode | None = None
    """How per-token losses become one number, over the global batch; null: as the objective's paper does.
    token_mean; seq_mean_token_sum; seq_mean_token_mean; seq_mean_token_sum_norm (by the longest response allowed)."""
    step_control: StepControlConfig = StepControlConfig()
    reference_kl_coef: float = Field(0.0, ge=0)
    """Weight of KL(π_θ ‖ π_ref), the reference being the starting policy. 0: no reference is loaded."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    gradient_checkpointing: bool = False
    offload: Literal["none", "cpu"] = "none"
    """Where optimiser states live."""
    start_deadline_s: float = Field(600, gt=0)
    step_deadline_s: float = Field(600, gt=0)
    max_restarts: int = Field(3, ge=0)
    """Times in a row that all ranks are started again from the newest checkpoint, without a step in between."""


class WeightSyncConfig(Section):
    """Trainer to engines, by vLLM's own weight transfer."""

    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """auto: nccl on cuda, gloo (ours) on cpu."""
    rendezvous_deadline_s: float = Field(120, gt=0)
    pause_deadline_s: float = Field(30, gt=0)
    transfer_deadline_s: float = Field(300, gt=0)
    resume_deadline_s: float = Field(30, gt=0)


class Config(Section):
    """Everything that a run depends on."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    rewards: dict[str, RewardConfig] = Field(min_length=1)
    """Parts by name; the reward is their weighted sum. The first says whether a response is correct (evaluation)."""
    environments: dict[str, EnvironmentConfig] = Field({})
    """By name; sources of data say which one they play in."""
    generator: GeneratorConfig
    verifier: VerifierConfig = VerifierConfig()
    filters: FilterConfig = FilterConfig()
    replay: ReplayConfig
    objective: ObjectiveConfig
    learner: LearnerConfig
    weight_sync: WeightSyncConfig = WeightSyncConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    cluster: ClusterConfig = ClusterConfig()

    @property
    def sync_backend(self) -> Literal["nccl", "gloo"]:
        if self.weight_sync.backend == "auto":
            return "nccl" if self.cluster.device == "cuda" else "gloo"
        return self.weight_sync.backend

    @property
    def checkpoint_dir(self) -> Path:
        return self.checkpoint.dir or self.run.dir / "checkpoints"

    @model_validator(mode="after")
    def _everything_is_judged(self) -> Config:
        sources = {*self.data.train, *self.data.eval}
        for name, part in self.rewards.items():
            if unknown := sorted(set(part.only or ()) - sources):
                raise ValueError(f"rewards.{name}.only={unknown}: no source has that name; there are {sorted(sources)}")
        judged = [sources if part.only is None else set(part.only) for part in self.rewards.values()]
        if missing := sorted(sources - set().union(*judged)):
            raise ValueError(f"rewards: no part judges the source {missing[0]!r}; add one, or widen `only`")
        return self

    @property
    def sources(self) -> dict[str, list[SourceConfig]]:
        """Of data.train and data.eval, by name."""
        named: dict[str, list[SourceConfig]] = {}
        for name, source in [*self.data.train.items(), *self.data.eval.items()]:
            named.setdefault(name, []).append(source)
        return named

    @model_validator(mode="after")
    def _environments_are_there(self) -> Config:
        for name, sources in self.sources.items():
            used = {s.environment for s in sources}
            if unknown := sorted(e for e in used if e is not None and e not in self.environments):
                raise ValueError(
                    f"data: the source {name!r} plays in the environment {unknown[0]!r}, and environments has "
                    f"{sorted(self.environments) or 'none'}; add it or correct the name"
                )
            if len(used) > 1:
                raise ValueError(
                    f"data: train and eval have a source {name!r} each, of different environments "
                    f"{sorted(map(str, used))}: give both the same, or different names"
                )
            for part_name, part in self.rewards.items():
                judges = part.only is None or name in part.only
                if isinstance(part, EnvironmentRewardConfig) and judges and used == {None}:
                    raise ValueError(
                        f"rewards.{part_name} takes what an episode returned, and the source {name!r} has no "
                        f"environment: list the others in rewards.{part_name}.only, or give it one"
                    )
        return self

    @model_validator(mode="after")
    def _programs_have_time(self) -> Config:
        for name, part in self.rewards.items():
            if isinstance(part, CodeRewardConfig) and part.limits.wall_s > self.verifier.deadline_s:
                raise ValueError(
                    f"verifier.deadline_s={self.verifier.deadline_s:g} must be at least rewards.{name}.limits.wall_s="
                    f"{part.limits.wall_s:g}, and as many times that as there are test cases: raise it"
                )
        return self

    @model_validator(mode="after")
    def _rollout_fits(self) -> Config:
        longest = self.generator.max_prompt_tokens + self.generator.max_response_tokens
        if self.learner.tokens_per_micro_batch < longest:
            raise ValueError(
                f"learner.tokens_per_micro_batch={self.learner.tokens_per_micro_batch} must hold the longest rollout "
                f"(generator.max_prompt_tokens + max_response_tokens = {longest}): raise it or shorten the responses"
            )
        return self

    @model_validator(mode="after")
    def _ranks_have_work(self) -> Config:
        rollouts = self.replay.groups_per_step * self.replay.group_size
        if rollouts < self.learner.num_ranks:
            raise ValueError(
                f"replay.groups_per_step * group_size = {rollouts} rollouts a step must be at least "
                f"learner.num_ranks={self.learner.num_ranks}: every rank needs one"
            )
        return self

    @model_validator(mode="after")
    def _no_length_bias(self) -> Config:
        mode = self.learner.loss_agg_mode
        if self.objective.kind == "dr_grpo" and mode in ("token_mean", "seq_mean_token_mean"):
            raise ValueError(
                f"learner.loss_agg_mode={mode} divides by response lengths, the bias that dr_grpo removes: "
                "use seq_mean_token_sum_norm (or leave it out), or objective.kind grpo"
            )
        if self.objective.kind == "gspo" and mode in ("token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"):
            raise ValueError(
                f"learner.loss_agg_mode={mode} weights responses by their length, which gspo's loss over whole "
                "responses does not: use seq_mean_token_mean (or leave it out)"
            )
        return self

    @model_validator(mode="after")
    def _device_rules(self) -> Config:
        if self.cluster.device == "cpu":
            if self.weight_sync.backend == "nccl":
                raise ValueError("weight_sync.backend=nccl needs cluster.device=cuda: use auto or gloo")
            if self.learner.attn_implementation == "flash_attention_2":
                raise ValueError("learner.attn_implementation=flash_attention_2 needs cluster.device=cuda: use sdpa")
        return self

    @model_validator(mode="after")
    def _warm_up_has_a_model(self) -> Config:
        if self.data.warmup is not None and not isinstance(self.model, TinyModelConfig):
            raise ValueError("data.warmup is for models of kind tiny, and model.kind is pretrained: remove it")
        return self

    @model_validator(mode="after")
    def _steps_fit(self) -> Config:
        if self.learner.num_warmup_steps >= self.run.num_steps:
            raise ValueError(
                f"learner.num_warmup_steps={self.learner.num_warmup_steps} must be below run.num_steps="
                f"{self.run.num_steps}: the learning rate would never be reached"
            )
        if self.generator.deterministic and self.generator.num_engines > 1:
            raise ValueError(
                f"generator.deterministic needs num_engines=1, not {self.generator.num_engines}: "
                "with several, which engine takes a group depends on timing"
            )
        return self
