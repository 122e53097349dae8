"""The optimiser steps of one batch on one rank of the learner group: every method is a collective over all ranks.

Shape letters: Q queries, N tokens of a micro-batch, M response tokens of the global batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import mean

import torch
import torch.distributed as dist
from torch import Tensor

from quatro_ray.algorithms import losses
from quatro_ray.algorithms.aggregation import BatchSize, aggregate
from quatro_ray.algorithms.entropy_control import EntropyControl
from quatro_ray.algorithms.step_control import StepControl, StepLimits
from quatro_ray.config import LearnerConfig
from quatro_ray.engines.batches import MicroBatchTensors, Prepared, StepBatch, make_step_batch, make_token_batch
from quatro_ray.engines.kl_probe import Probe
from quatro_ray.engines.learner_spec import LearnerSpec
from quatro_ray.engines.lora import Forward
from quatro_ray.engines.objectives import make_objective
from quatro_ray.engines.sequence_parallel import Ranks
from quatro_ray.engines.step_metrics import Collector
from quatro_ray.engines.zero_engine import ZeroEngine
from quatro_ray.engines.zero_step import ZeroStep
from quatro_ray.types import LearnerBatch, RowLayout, StepMetrics


@dataclass(frozen=True)
class _Row:
    """A micro-batch, and log π_k of its targets, float32 [N], nats, if a step before this one may have changed π."""

    micro: MicroBatchTensors
    start_logprobs: Tensor | None


@dataclass(frozen=True)
class _Batch:
    """The parts of a batch that all its micro-batches share."""

    whole: StepBatch
    prepared: Prepared
    collector: Collector


class BatchTrainer:
    """Trains on batches, by one optimiser step for each minibatch.

    Args:
        spec: that of the learner.
        ranks: this rank and the others.
        device: where the model lies.
        engine: DeepSpeed's engine around the policy.
        reference: the forward pass of the reference policy; None if its KL is not part of the loss.
        row_layout: how the model reads a row.

    Attributes:
        step_control: the controller of the steps; None if it is off. Its state belongs into a checkpoint.
        entropy_control: the controller of the entropy bonus; None if there is no target. Its state too.
    """

    def __init__(
        self,
        spec: LearnerSpec,
        *,
        ranks: Ranks,
        device: torch.device,
        engine: ZeroEngine,
        reference: Forward | None,
        row_layout: RowLayout,
    ) -> None:
        self._spec, self._config, self._ranks, self._device = spec, spec.config, ranks, device
        self._engine, self._reference, self._row_layout = engine, reference, row_layout
        self._objective = make_objective(spec.objective)
        self.step_control = _step_control(spec.config)
        self.entropy_control = _entropy_control(spec.config)

    def train(self, batch: LearnerBatch) -> StepMetrics:
        """Take the optimiser steps of a batch and return its metrics, the same on every rank."""
        learning_rate = self._engine.optimizer.param_groups[0]["lr"]  # step() sets that of the next step
        whole = make_step_batch(batch, self._device)
        rows = [_Row(micro, None) for micro in self.own_rows(batch)]
        if len(batch.rows_per_minibatch) > 1 or self._objective.needs_log_ratio:
            rows, whole = self._score_all(batch, rows, whole)
        prepared = self._objective.prepare(whole)
        dist.broadcast(prepared.advantage, src=0)  # all ranks must agree on whether to step, whatever user code does
        shared = _Batch(whole, prepared, Collector(whole.valid.numel(), self._device, self._ranks))
        updates = [self._minibatch(shared, batch, rows, chosen) for chosen in batch.minibatches()]
        metrics = shared.collector.reduce(whole.rewards, whole.valid) | shared.prepared.diagnostics | _merged(updates)
        if self.entropy_control:
            metrics["policy/entropy_coef"] = self.entropy_control.coef
            if any(update["step/skipped"] == update["step/uninformative"] == 0 for update in updates):
                self.entropy_control.observe(shared.collector.entropy)
        metrics["step/learning_rate"] = learning_rate
        metrics["step/micro_batches_per_rank"] = float(len(rows))
        return metrics

    def _score_all(self, batch: LearnerBatch, rows: Sequence[_Row], whole: StepBatch) -> tuple[list[_Row], StepBatch]:
        """Return both with the log-probs of all response tokens under the policy before the batch."""
        start = [self.logprobs(row.micro) for row in rows]
        total = torch.zeros(len(batch.rollout_index), dtype=torch.float64, device=self._device)
        before = [cell for of_rank in batch.cells[: self._ranks.row_rank] for row in of_rank for cell in row]
        offset = int(batch.num_response_tokens.flat[before].sum())
        for row, logprobs in zip(rows, start, strict=True):
            difference = (logprobs - row.micro.behavior_logprobs).double()[row.micro.is_response]
            total[offset : offset + len(difference)] = difference
            offset += len(difference)
        self._ranks.sum(total)
        if len(batch.rows_per_minibatch) > 1:
            rows = [_Row(row.micro, logprobs) for row, logprobs in zip(rows, start, strict=True)]
        return list(rows), replace(whole, log_ratio=total)

    def _minibatch(self, shared: _Batch, batch: LearnerBatch, rows: Sequence[_Row], chosen: slice) -> StepMetrics:
        """Take one optimiser step, unless no query of the minibatch prefers anything."""
        queries = _queries(batch, chosen, self._device)
        size = shared.whole.size(self._spec.max_response_tokens, queries)
        if shared.prepared.is_informative(queries):
            return self._update(shared, size, batch, rows, chosen)
        # a step would come from the optimiser's momentum, or from noise that the optimiser scales up
        with torch.no_grad():
            for row in rows[chosen]:
                self._loss(row, shared, size)
        self._engine.lr_scheduler.step()  # the schedule counts the steps of a run, taken or not
        return {"step/uninformative": 1.0, "step/skipped": 0.0}

    def _update(
        self,
        shared: _Batch,
        size: BatchSize,
        batch: LearnerBatch,
        rows: Sequence[_Row],
        chosen: slice,
    ) -> StepMetrics:
        """Take one optimiser step, under step control; return the metrics of the update."""
        engine = self._engine
        probe = self._probe(batch, chosen) if self.step_control else None
        for row in (chosen_rows := rows[chosen]):
            engine.set_gradient_accumulation_boundary(row is chosen_rows[-1])
            loss = self._loss(row, shared, size)
            # NaN here makes every gradient NaN, and then ZeRO-3 skips the step on all ranks together
            poison = torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)
            engine.backward(loss * poison * self._config.num_ranks)
        before = ZeroStep(engine.optimizer) if probe else None
        engine.step()
        applied = engine.was_step_applied()
        metrics: StepMetrics = {
            "step/uninformative": 0.0,
            "step/skipped": float(not applied),
            "step/grad_norm": float(engine.get_global_grad_norm() or 0.0),
        }
        if self.step_control and probe and before and applied:
            staleness = shared.whole.query_staleness()
            metrics |= self.step_control.control(lambda: probe.measure(staleness), before.move_to).metrics()
        return metrics

    def _probe(self, batch: LearnerBatch, chosen: slice) -> Probe:
        return Probe(
            batch,
            chosen,
            self._ranks,
            share=self._config.step_control.probe_share,
            limit=self._config.tokens_per_micro_batch,
            layout=self._row_layout,
            device=self._device,
            logprobs=self.logprobs,
        )

    def _loss(self, row: _Row, shared: _Batch, size: BatchSize) -> Tensor:
        """Return a micro-batch's share of the loss of its optimiser step."""
        micro = row.micro
        inputs = (micro.token_ids, micro.position_ids, micro.target_ids, micro.is_response)
        reference_logprobs = None
        if self._reference is not None:  # first, because it may be the same engine, whose next pass must be backward
            with torch.no_grad():
                reference_logprobs, _ = self._reference(*inputs)
        policy_logprobs, entropy = self._engine(*inputs)
        tokens = make_token_batch(micro, policy_logprobs, shared.prepared, row.start_logprobs)
        per_token, limited = self._objective.token_loss(tokens, shared.prepared.constant)
        if reference_logprobs is not None:
            reference_kl = losses.reference_kl(policy_logprobs, reference_logprobs)
            per_token = per_token + self._config.reference_kl_coef * reference_kl
            shared.collector.add_reference_kl(reference_kl.detach(), tokens.is_response)
        if self.entropy_control and self.entropy_control.coef > 0:
            per_token = per_token - self.entropy_control.coef * entropy
        shared.collector.add(tokens, entropy.detach(), per_token.detach(), limited)
        mode = self._config.loss_agg_mode or self._objective.loss_agg_mode
        return aggregate(per_token, tokens.is_response, tokens.rollout_index, mode, size)

    @torch.no_grad()
    def logprobs(self, micro: MicroBatchTensors) -> Tensor:
        """Return the log-probs of the targets under the present weights, float32 [N], nats, 0 outside responses."""
        values, _ = self._engine(micro.token_ids, micro.position_ids, micro.target_ids, micro.is_response)
        return values

    def own_rows(self, batch: LearnerBatch) -> list[MicroBatchTensors]:
        """Return the micro-batches of this rank."""
        return [MicroBatchTensors.copy_from(micro, self._device) for micro in batch.micro_batches]


def _queries(batch: LearnerBatch, chosen: slice, device: torch.device) -> Tensor:
    """Return the queries, bool [Q], to which the chosen rows of all ranks belong."""
    return torch.from_numpy(batch.of_rows(chosen).any(1)).to(device)


def _merged(updates: Sequence[StepMetrics]) -> StepMetrics:
    """Join the metrics of a batch's optimiser steps: lists are concatenated, numbers averaged."""
    merged: StepMetrics = {}
    for name in dict.fromkeys(name for update in updates for name in update):
        values = [update[name] for update in updates if name in update]
        numbers = [value for value in values if isinstance(value, float)]
        in_lists = [number for value in values if isinstance(value, list) for number in value]
        merged[name] = mean(numbers) if numbers else in_lists
    return {"step/grad_norm": 0.0} | merged


def _step_control(config: LearnerConfig) -> StepControl | None:
    limits = config.step_control
    if limits.window_kl_nats_per_token is None:
        return None
    return StepControl(StepLimits(limits.window_kl_nats_per_token, limits.max_kl_nats_per_token))


def _entropy_control(config: LearnerConfig) -> EntropyControl | None:
    if config.entropy_target_nats is None:
        return None
    return EntropyControl(config.entropy_target_nats, config.entropy_coef_step)
