"""The root of the configuration, and the rules that span its sections."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from quatro_ray.config.base import Section
from quatro_ray.config.data import DataConfig, EvalSourceConfig, FilterConfig
from quatro_ray.config.environments import EnvironmentConfig
from quatro_ray.config.generator import GeneratorConfig
from quatro_ray.config.learner import LearnerConfig
from quatro_ray.config.lora import LoraConfig
from quatro_ray.config.model import ModelConfig, TinyModelConfig
from quatro_ray.config.objectives import ObjectiveConfig
from quatro_ray.config.replay import ReplayConfig
from quatro_ray.config.rewards import CodeRewardConfig, EnvironmentRewardConfig, RewardConfig
from quatro_ray.config.run import CheckpointConfig, ClusterConfig, EvaluationConfig, RunConfig, TelemetryConfig
from quatro_ray.config.verifier import VerifierConfig
from quatro_ray.config.weight_sync import WeightSyncConfig


class Config(Section):
    """Everything that a run depends on."""

    run: RunConfig
    """Directory, seed and length."""
    model: ModelConfig
    """The model that is trained."""
    data: DataConfig
    """Queries for training, evaluation and the warm-up."""
    rewards: dict[str, RewardConfig] = Field(min_length=1)
    """Rewards by name; a response receives their weighted sum. The first one decides whether it counts as correct."""
    environments: dict[str, EnvironmentConfig] = Field({})
    """Environments by name; a source of data names the one in which its rollouts are episodes."""
    generator: GeneratorConfig
    """Sampling: engines, lengths, deadlines."""
    verifier: VerifierConfig = VerifierConfig()
    """Scoring: processes, limits, deadlines."""
    filters: FilterConfig = FilterConfig()
    """Groups that are dropped before training."""
    replay: ReplayConfig
    """Batch size, group size and staleness."""
    objective: ObjectiveConfig
    """The method: how rewards become a loss."""
    learner: LearnerConfig
    """Training: ranks, optimiser, memory, deadlines."""
    weight_sync: WeightSyncConfig = WeightSyncConfig()
    """Back end and deadlines of weight updates."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Frequency, size and sampling of evaluations."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Frequency, place and number of checkpoints."""
    telemetry: TelemetryConfig = TelemetryConfig()
    """Further records."""
    cluster: ClusterConfig = ClusterConfig()
    """Devices, CPU reservations and cluster deadlines."""

    @property
    def sync_backend(self) -> Literal["nccl", "ipc", "gloo"]:
        """The transport of weights, with `auto` resolved."""
        if self.weight_sync.backend != "auto":
            return self.weight_sync.backend
        if self.cluster.device == "cpu":
            return "gloo"
        return "ipc" if self.cluster.colocate else "nccl"

    @property
    def alternates(self) -> bool:
        """Whether engines and learner use the memory of their devices in turn."""
        return self.cluster.colocate and self.cluster.colocate_mode == "alternating"

    @property
    def engine_adapter(self) -> LoraConfig | None:
        """The adapters that engines load; None if they get whole weights."""
        lora = self.learner.lora
        return lora if lora is not None and lora.sync == "adapter" else None

    @property
    def checkpoint_dir(self) -> Path:
        """The directory of the checkpoints, with the default resolved."""
        return self.checkpoint.dir or self.run.dir / "checkpoints"

    @property
    def sources(self) -> dict[str, list[EvalSourceConfig]]:
        """The sources of data.train and data.eval by name; a name in both has two."""
        named: dict[str, list[EvalSourceConfig]] = {}
        for name, source in [*self.data.train.items(), *self.data.eval.items()]:
            named.setdefault(name, []).append(source)
        return named

    def broken_rules(self) -> Iterator[str]:
        """Yield a line for each broken rule between fields of different sections."""
        yield from self._every_source_is_scored()
        yield from self._environments_exist()
        yield from self._programs_have_time()
        yield from self._batches_fit()
        yield from self._normalisation_suits_the_objective()
        yield from self._device_has_what_is_asked()
        yield from self._shared_devices_suffice()
        yield from self._model_and_schedule_fit()

    def _every_source_is_scored(self) -> Iterator[str]:
        sources = set(self.sources)
        scored: set[str] = set()
        for name, reward in self.rewards.items():
            scored |= sources if reward.only is None else set(reward.only)
            if unknown := sorted(set(reward.only or ()) - sources):
                yield f"rewards.{name}.only={unknown}: no source has that name; choose from {sorted(sources)}"
        for source in sorted(sources - scored):
            yield f"rewards: no reward scores the source {source!r}; add one, or widen `only`"

    def _environments_exist(self) -> Iterator[str]:
        for name, sources in self.sources.items():
            used = {s.environment for s in sources}
            for unknown in sorted(e for e in used if e is not None and e not in self.environments):
                yield (
                    f"data: the source {name!r} plays in the environment {unknown!r}, and environments has "
                    f"{sorted(self.environments) or 'none'}; add it or correct the name"
                )
            if len(used) > 1:
                yield (
                    f"data: the source {name!r} has different environments in train and eval, "
                    f"{sorted(map(str, used))}: give both the same, or different names"
                )
            for reward_name, reward in self.rewards.items():
                scores = reward.only is None or name in reward.only
                if isinstance(reward, EnvironmentRewardConfig) and scores and used == {None}:
                    yield (
                        f"rewards.{reward_name} takes what an episode returned, and the source {name!r} has no "
                        f"environment: list the other sources in rewards.{reward_name}.only, or give this one an "
                        "environment"
                    )

    def _programs_have_time(self) -> Iterator[str]:
        for name, reward in self.rewards.items():
            if isinstance(reward, CodeRewardConfig) and reward.limits.wall_s > self.verifier.deadline_s:
                yield (
                    f"verifier.deadline_s={self.verifier.deadline_s:g} must be at least rewards.{name}.limits.wall_s="
                    f"{reward.limits.wall_s:g} times the number of test cases: raise it"
                )

    def _batches_fit(self) -> Iterator[str]:
        longest = self.generator.max_prompt_tokens + self.generator.max_response_tokens
        if self.learner.tokens_per_micro_batch < longest:
            yield (
                f"learner.tokens_per_micro_batch={self.learner.tokens_per_micro_batch} must hold the longest rollout "
                f"(generator.max_prompt_tokens + max_response_tokens = {longest}): raise it or shorten the responses"
            )
        if self.learner.num_minibatches > self.replay.groups_per_step:
            yield (
                f"learner.num_minibatches={self.learner.num_minibatches} must be at most replay.groups_per_step="
                f"{self.replay.groups_per_step}, because each takes whole groups: lower it"
            )
            return
        rollouts = self.replay.groups_per_step // self.learner.num_minibatches * self.replay.group_size
        size = self.learner.sequence_parallel_size
        if rollouts < self.learner.num_ranks // size:
            shared = f" // sequence_parallel_size={size}" if size > 1 else ""
            yield (
                f"learner.num_ranks={self.learner.num_ranks}{shared} must be at most the rollouts of a step "
                f"(replay.groups_per_step // learner.num_minibatches * group_size = {rollouts}), because every rank "
                "needs one: lower it"
            )

    def _normalisation_suits_the_objective(self) -> Iterator[str]:
        mode = self.learner.loss_agg_mode
        if self.objective.kind == "dr_grpo" and mode in ("token_mean", "prompt_mean", "seq_mean_token_mean"):
            yield (
                f"learner.loss_agg_mode={mode} divides by response lengths, the bias that dr_grpo removes: "
                "use seq_mean_token_sum_norm (or leave it out), or objective.kind grpo"
            )
        if self.objective.kind == "gspo" and mode not in (None, "seq_mean_token_mean"):
            yield (
                f"learner.loss_agg_mode={mode} weights responses by their length, which gspo's loss over whole "
                "responses does not: use seq_mean_token_mean (or leave it out)"
            )

    def _device_has_what_is_asked(self) -> Iterator[str]:
        if self.cluster.device == "cuda":
            return
        if (backend := self.weight_sync.backend) in {"nccl", "ipc"}:
            yield f"weight_sync.backend={backend} needs cluster.device=cuda: use auto or gloo"
        attention = self.learner.attn_implementation
        if attention in {"flash_attention_2", "flex_attention"}:
            yield f"learner.attn_implementation={attention} needs cluster.device=cuda: use auto"
        if self.generator.engine_args.get("speculative_config") is not None:
            yield (
                "generator.engine_args.speculative_config needs cluster.device=cuda, because vLLM's engine on CPU then "
                "samples from another distribution (docs/models.md): remove it"
            )

    def _shared_devices_suffice(self) -> Iterator[str]:
        generator, is_gpu = self.generator, self.cluster.device == "cuda"
        if not self.cluster.colocate:
            if self.weight_sync.backend == "ipc":
                yield "weight_sync.backend=ipc needs cluster.colocate=true, because it shares memory of a GPU: use auto"
            return
        if generator.devices_per_engine > 1:
            yield (
                f"cluster.colocate=true needs engines of one device, and generator.*_parallel_size ask for "
                f"{generator.devices_per_engine}: set them to 1 and raise num_engines, or set colocate to false"
            )
        if {generator.num_engines, generator.max_num_engines} != {self.learner.num_ranks}:
            yield (
                f"cluster.colocate=true needs as many engines as ranks, and generator.num_engines="
                f"{generator.num_engines}, max_engines={generator.max_num_engines}, learner.num_ranks="
                f"{self.learner.num_ranks}: set all to the number of GPUs"
            )
        if is_gpu and generator.kv_cache_gib is None:
            yield (
                "cluster.colocate=true needs generator.kv_cache_gib, because vLLM would measure the free memory while "
                "the learner takes its part: set it (`quatro-ray plan` shows what is left)"
            )
        if self.weight_sync.backend == "nccl":
            yield (
                "weight_sync.backend=nccl does not work with cluster.colocate=true, because NCCL refuses two processes "
                "on one GPU: use auto (ipc) or gloo"
            )

    def _model_and_schedule_fit(self) -> Iterator[str]:
        if self.data.warmup is not None and not isinstance(self.model, TinyModelConfig):
            yield "data.warmup needs model.kind=tiny, and model.kind is pretrained: remove it"
        num_steps = self.run.num_steps * self.learner.num_minibatches
        if self.learner.num_warmup_steps >= num_steps:
            factor = "" if self.learner.num_minibatches == 1 else " * learner.num_minibatches"
            yield (
                f"learner.num_warmup_steps={self.learner.num_warmup_steps} must be below run.num_steps{factor}="
                f"{num_steps}, or the learning rate would never be reached: lower it"
            )
