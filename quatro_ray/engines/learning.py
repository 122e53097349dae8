"""One rank of the ZeRO-3 learner group, as a plain class: every method is a collective over all ranks."""

from __future__ import annotations

import os
import random
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from quatro_ray.algorithms import losses
from quatro_ray.algorithms.aggregation import BatchSize, aggregate
from quatro_ray.algorithms.step_control import StepControl, StepLimits
from quatro_ray.config import LearnerConfig, ObjectiveConfig, StepControlConfig
from quatro_ray.engines import step_metrics, zero_checkpoint
from quatro_ray.engines.batches import StepBatch, make_step_batch, make_token_batch
from quatro_ray.engines.kl_probe import Probe
from quatro_ray.engines.objectives import Prepared, make_objective
from quatro_ray.engines.policy import PolicyModel, export
from quatro_ray.engines.zero_step import ZeroStep
from quatro_ray.types import LearnerBatch, MicroBatch

if TYPE_CHECKING:
    from quatro_ray.weight_sync.zero_source import ZeroWeightSource

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class LearningEngine:
    """Trains by one optimiser step a batch; its version counts the steps done."""

    def __init__(
        self,
        model_path: str,
        config: LearnerConfig,
        objective: ObjectiveConfig,
        *,
        rank: int,
        device: Literal["cpu", "cuda"],
        temperature: float,
        max_response_tokens: int,
        seed: int,
        num_steps: int,
    ) -> None:
        self._model_path = model_path
        self._config = config
        self._objective = make_objective(objective)
        self._rank = rank
        self._device = torch.device(device, 0) if device == "cuda" else torch.device("cpu")
        self._temperature = temperature
        self._max_response_tokens = max_response_tokens
        self._seed = seed
        self._num_steps = num_steps
        self._step_control = _step_control(config.step_control)
        self.version = 0

    def start(self, master_address: str, master_port: int) -> None:
        """Joins the group and loads the model, sharded over the ranks."""
        import deepspeed

        _seed_everything(self._seed)
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        # torch.distributed comes up before DeepSpeed: left to itself it binds the group to a device,
        # and groups made beside that one, as for weight transfer, were seen to hang
        dist.init_process_group(
            "nccl" if self._device.type == "cuda" else "gloo",
            init_method=f"tcp://{master_address}:{master_port}",
            rank=self._rank,
            world_size=self._config.num_ranks,
            timeout=timedelta(seconds=self._config.step_deadline_s),
        )
        os.environ.setdefault("LOCAL_RANK", "0")
        # on CPU DeepSpeed would compile a collective that training does not use: a minute, a compiler, and a lock in
        # the home folder that a killed build leaves behind, on which every later start waits for ever
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_init_required=False)
        self._policy = self._load_policy()
        if self._config.gradient_checkpointing:
            self._policy.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})
        optimizer = torch.optim.AdamW(
            self._policy.parameters(),
            lr=self._config.learning_rate,
            betas=(self._config.adam_beta1, self._config.adam_beta2),
            weight_decay=self._config.weight_decay,
        )
        self._engine, *_ = deepspeed.initialize(
            model=self._policy,
            optimizer=optimizer,
            lr_scheduler=self._schedule(optimizer),
            config=self._deepspeed_config(),
            dist_init_required=False,
        )
        self._reference = self._load_reference() if self._config.reference_kl_coef > 0 else None

    @cached_property
    def weights(self) -> ZeroWeightSource:
        """The policy's parameters as a vLLM weight source; iterating over it is a collective."""
        # imported here, because training alone, as benchmarks.gpu.learner does it, does not need vLLM
        from quatro_ray.weight_sync.zero_source import ZeroWeightSource

        return ZeroWeightSource(self._policy.checkpoint_names())

    def _load_policy(self) -> PolicyModel:
        return PolicyModel(
            self._model_path,
            dtype=_DTYPES[self._config.dtype],
            attn_implementation=self._config.attn_implementation,
            temperature=self._temperature,
            chunk_tokens=self._config.logprob_chunk_tokens,
        )

    def _load_reference(self) -> Any:
        import deepspeed

        reference = self._load_policy().requires_grad_(False)
        engine, *_ = deepspeed.initialize(model=reference, config=self._deepspeed_config(), dist_init_required=False)
        return engine

    def _schedule(self, optimizer: torch.optim.Optimizer) -> Any:
        from transformers import get_scheduler

        schedule = self._config.schedule
        name = "constant_with_warmup" if schedule == "constant" else schedule
        return get_scheduler(name, optimizer, self._config.num_warmup_steps, self._num_steps)

    def _deepspeed_config(self) -> dict[str, Any]:
        config = self._config
        zero: dict[str, Any] = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": False}
        if config.offload == "cpu":
            zero["offload_optimizer"] = {"device": "cpu"}
        return {
            # micro-batches are packed by tokens, and their number is set step by step; see train_step
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": config.max_grad_norm,
            "bf16": {"enabled": config.dtype == "bfloat16"},
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": None,
        }

    def train_step(self, batch: LearnerBatch, learner_version: int) -> dict[str, Any]:
        """One optimiser step.

        A loss or gradient that is not finite on any rank skips the update on all ranks, and says so in
        `step/skipped`; the version counts the attempt, so that numbering never repeats.

        Raises:
            RuntimeError: the batch was made for another version; ranks would drift apart.
        """
        if learner_version != self.version:
            raise RuntimeError(f"rank {self._rank} is at version {self.version}, asked to train from {learner_version}")
        micro_batches = [self._tensors(micro) for micro in batch.micro_batches[self._rank]]
        step_batch = self._step_batch(batch, micro_batches)
        prepared = self._objective.prepare(step_batch)
        collector = step_metrics.Collector(step_batch.valid.numel(), self._device)
        start_logprobs = []
        for number, t in enumerate(micro_batches, start=1):
            self._engine.set_gradient_accumulation_boundary(number == len(micro_batches))
            loss, policy_logprobs = self._micro_loss(t, prepared, batch, collector)
            start_logprobs.append(policy_logprobs)
            # NaN here makes every gradient NaN, and ZeRO-3 refuses such a step on all ranks together
            poison = torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)
            self._engine.backward(loss * poison * self._config.num_ranks)
        before = ZeroStep(self._engine.optimizer) if self._step_control else None
        self._engine.step()
        applied = self._engine.was_step_applied()
        metrics = collector.reduce(step_batch.rewards, step_batch.valid) | prepared.diagnostics
        if self._step_control and before and applied:
            probe = Probe(micro_batches, start_logprobs, self._config.step_control.probe_share, step_batch.valid)
            staleness = step_batch.query_staleness()
            report = self._step_control.control(lambda: probe.measure(self._logprobs, staleness), before.move_to)
            metrics |= report.metrics()
        self.version += 1
        metrics["step/skipped"] = float(not applied)
        metrics["step/grad_norm"] = float(self._engine.get_global_grad_norm() or 0.0)
        metrics["step/learning_rate"] = self._engine.optimizer.param_groups[0]["lr"]
        metrics["step/micro_batches_per_rank"] = float(len(micro_batches))
        return metrics

    def _micro_loss(
        self, t: dict[str, Tensor], prepared: Prepared, batch: LearnerBatch, collector: step_metrics.Collector
    ) -> tuple[Tensor, Tensor]:
        """This micro-batch's share of the loss, and the log-probs [N] of its targets without gradient."""
        policy_logprobs, entropy = self._engine(t["token_ids"], t["position_ids"], t["target_ids"])
        tokens = make_token_batch(t, policy_logprobs, prepared.advantage)
        per_token, limited = self._objective.token_loss(tokens, prepared.constant)
        if self._reference is not None:
            with torch.no_grad():
                reference_logprobs, _ = self._reference(t["token_ids"], t["position_ids"], t["target_ids"])
            reference_kl = losses.reference_kl(policy_logprobs, reference_logprobs)
            per_token = per_token + self._config.reference_kl_coef * reference_kl
            collector.add_reference_kl(reference_kl.detach(), tokens.is_response)
        collector.add(tokens, entropy, per_token.detach(), limited)
        mode = self._config.loss_agg_mode or self._objective.loss_agg_mode
        size = BatchSize(batch.num_tokens, batch.num_rollouts, tokens.num_cells, self._max_response_tokens)
        return aggregate(
            per_token, tokens.is_response, tokens.rollout_index, mode, size
        ), tokens.policy_logprobs.detach()

    def _step_batch(self, batch: LearnerBatch, micro_batches: list[dict[str, Tensor]]) -> StepBatch:
        """Log-ratios take a pass, where the objective asks for them; all the rest every rank knows of all."""
        log_ratio = None
        if self._objective.needs_log_ratio:
            counts = [sum(int(micro.is_response.sum()) for micro in rank) for rank in batch.micro_batches]
            log_ratio = self._log_ratio(micro_batches, sum(counts[: self._rank]), sum(counts))
        return make_step_batch(batch, log_ratio, self._device)

    @torch.no_grad()
    def _log_ratio(self, micro_batches: list[dict[str, Tensor]], offset: int, num_tokens: int) -> Tensor:
        """float64 [M]: log π_θ − log β of the response tokens of all ranks, this rank's at `offset`, on every rank."""
        total = torch.zeros(num_tokens, dtype=torch.float64, device=self._device)
        for t in micro_batches:
            difference = (self._logprobs(t) - t["behavior_logprobs"]).double()[t["is_response"]]
            total[offset : offset + len(difference)] = difference
            offset += len(difference)
        dist.all_reduce(total)
        return total

    @torch.no_grad()
    def _logprobs(self, t: dict[str, Tensor]) -> Tensor:
        """Float32 [N], of the targets, 0 outside of responses."""
        values, _ = self._engine(t["token_ids"], t["position_ids"], t["target_ids"])
        return torch.where(t["is_response"], values, 0.0)

    def logprobs(self, batch: LearnerBatch) -> list[np.ndarray]:
        """Float32 [N] for each micro-batch of this rank, under the current version, 0 outside responses."""
        return [self._logprobs(self._tensors(micro)).cpu().numpy() for micro in batch.micro_batches[self._rank]]

    def _tensors(self, micro: MicroBatch) -> dict[str, Tensor]:
        # copies: arrays that come from Ray's object store are read-only
        return {name: torch.tensor(value, device=self._device) for name, value in vars(micro).items()}

    def save_checkpoint(self, folder: Path) -> None:
        """DeepSpeed's own format: each rank writes its shards of weights and optimiser states, 12 bytes a parameter.

        Args:
            folder: new or empty; shards that more ranks left there would pass for a part of this one.
        """
        state = {
            "version": self.version,
            "step_control_kept": self._step_control.kept if self._step_control else 1.0,
            "random_states": zero_checkpoint.random_states(self._device),
        }
        self._engine.save_checkpoint(str(folder.parent), tag=folder.name, client_state=state, save_latest=False)

    def load_checkpoint(self, folder: Path, version: int | None = None) -> None:
        """Weights, optimiser and schedule, step control, random states and version as they were when it was saved.

        Saved by as many ranks, training goes on bit for bit; otherwise DeepSpeed's universal format is written
        beside `folder` for the time of loading, and the random states of rank 0 become those of all. The reference
        stays the policy of `model_path`. Call it after `start`; every rank must see `folder`.

        Args:
            version: to go on from instead of the one saved, so that after a roll-back no number means two policies.

        Raises:
            CheckpointError: the checkpoint is not there, is incomplete, or is of another model or dtype.
        """
        state = zero_checkpoint.load(self._engine, folder)
        self.version = state["version"] if version is None else version
        if self._step_control:
            self._step_control.kept = state["step_control_kept"]
        zero_checkpoint.restore_random_states(state["random_states"], self._device)

    def export(self, path: Path) -> None:
        """Hugging Face format, written by rank 0; the gather is a collective."""
        state = {}
        for name, tensor in self.weights:
            if self._rank == 0:
                state[name] = tensor.cpu()
        if self._rank == 0:
            export(self._policy, state, self._model_path, path)
        dist.barrier()

    def shutdown(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def _step_control(config: StepControlConfig) -> StepControl | None:
    if config.window_kl_nats_per_token is None:
        return None
    return StepControl(StepLimits(config.window_kl_nats_per_token, config.max_kl_nats_per_token))


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
