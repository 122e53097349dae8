"""One RL run in one process at exactly constant staleness, with the product's objectives and step control.

Shape letters: Q queries, G rollouts a query, T response tokens; [N] is [Q·G·T] flattened.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.toy.model import ToyModel
from benchmarks.toy.tasks import Task
from benchmarks.whole_batch import loss_of
from quatro_ray.algorithms.step_control import ProbeKl, StepControl, StepLimits, StepReport, rollout_kl
from quatro_ray.config import LearnerConfig, ObjectiveConfig
from quatro_ray.engines.objectives import make_objective
from quatro_ray.evaluation.metrics import pass_at_k

GROUP_SIZE = 16
EVALUATION_SAMPLES = 16
_EVALUATED = (1 / 4, 1 / 2, 3 / 4, 7 / 8, 1)
"""Parts of a run after which the policy is evaluated."""
_LR_WARMUP_STEPS = 10


@dataclass(frozen=True)
class Samples:
    """Samples of policy `version`: prompts [Q, P]; responses, logprobs, counted [Q, G, T]; rewards [Q, G]."""

    version: int
    prompts: Tensor
    responses: Tensor
    logprobs: Tensor
    counted: Tensor
    rewards: Tensor


class ToyTrainer:
    """Trains step k on samples of policy max(0, k − staleness)."""

    def __init__(
        self, model: ToyModel, task: Task, objective: ObjectiveConfig, learner: LearnerConfig, staleness: int, seed: int
    ) -> None:
        self.model, self.task = model, task
        self._objective = make_objective(objective)
        self._learner = learner
        self._generator = torch.Generator().manual_seed(seed)
        self._optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=learner.learning_rate,
            betas=(learner.adam_beta1, learner.adam_beta2),
            weight_decay=learner.weight_decay,
        )
        control = learner.step_control
        self._step_control = None
        if control.window_kl_nats_per_token is not None:
            limits = StepLimits(control.window_kl_nats_per_token, control.max_kl_nats_per_token)
            self._step_control = StepControl(limits)
        self._waiting: deque[Samples] = deque(self._sample(0) for _ in range(staleness))
        self.version = 0

    def _sample(self, version: int) -> Samples:
        task = self.task
        rows = torch.randint(len(task.prompts), (task.num_queries,), generator=self._generator)
        responses, logprobs, counted = self.model.sample(
            task.prompts[rows], GROUP_SIZE, task.max_response_tokens, task.eos, self._generator
        )
        return Samples(
            version, task.prompts[rows], responses, logprobs, counted, task.rewards(responses, task.answers[rows])
        )

    def step(self) -> dict[str, float]:
        self._waiting.append(self._sample(self.version))
        batch = self._waiting.popleft()
        start = [p.detach().clone() for p in self.model.parameters()]
        policy_logprobs, entropy = self._score(batch)
        loss, prepared = loss_of(
            self._objective,
            policy_logprobs=policy_logprobs,
            behavior_logprobs=batch.logprobs,
            counted=batch.counted,
            rewards=batch.rewards,
            staleness=self.version - batch.version,
            mode=self._learner.loss_agg_mode,
        )
        report = None
        if prepared.is_informative():
            self._optimizer_step(loss)
            report = self._control(batch, policy_logprobs.detach(), start)
        self.version += 1
        return {
            "reward": float(batch.rewards.mean()),
            "entropy": entropy,
            "kept": report.kept if report else 1.0,
            "share_of_budget": report.share_of_budget if report else 0.0,
        }

    def _optimizer_step(self, loss: Tensor) -> None:
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._learner.max_grad_norm)
        warm = min(1.0, (self.version + 1) / _LR_WARMUP_STEPS)
        self._optimizer.param_groups[0]["lr"] = self._learner.learning_rate * warm
        self._optimizer.step()

    def _score(self, batch: Samples) -> tuple[Tensor, float]:
        """Return log-probs [Q, G, T] of the responses, 0 if not counted, and the mean entropy in nats per token."""
        distribution = self.model.score(batch.prompts, batch.responses)
        chosen = distribution.gather(-1, batch.responses[..., None])[..., 0]
        with torch.no_grad():
            entropy = -(distribution.exp() * distribution).sum(-1)[batch.counted].mean()
        return torch.where(batch.counted, chosen, 0.0), float(entropy)

    @torch.no_grad()
    def _control(self, batch: Samples, start_logprobs: Tensor, start: list[Tensor]) -> StepReport | None:
        if self._step_control is None:
            return None
        probed = slice(max(1, round(self._learner.step_control.probe_share * GROUP_SIZE)))
        part = Samples(
            batch.version,
            batch.prompts,
            *(getattr(batch, name)[:, probed] for name in ("responses", "logprobs", "counted", "rewards")),
        )
        stepped = [p.detach().clone() for p in self.model.parameters()]
        index = torch.arange(part.rewards.numel()).repeat_interleave(part.counted.shape[-1])

        def measure() -> ProbeKl:
            logprobs, _ = self._score(part)
            kl = rollout_kl(
                logprobs.flatten(),
                start_logprobs[:, probed].flatten(),
                part.logprobs.flatten(),
                part.counted.flatten(),
                index,
                part.rewards.numel(),
            ).view_as(part.rewards)
            per_token = kl.sum(1) / part.counted.sum((1, 2))
            return ProbeKl(per_token, torch.full((len(kl),), float(self.version - part.version), dtype=torch.float64))

        def move_to(kept: float) -> None:
            for p, a, b in zip(self.model.parameters(), start, stepped, strict=True):
                p.copy_(torch.lerp(a, b, kept))

        return self._step_control.control(measure, move_to)


@torch.no_grad()
def evaluate(model: ToyModel, task: Task, seed: int) -> dict[str, float]:
    """Evaluate the held-out questions: pass@1, pass@16, distinct correct answers, entropy in nats per token."""
    generator = torch.Generator().manual_seed(seed)
    responses, logprobs, counted = model.sample(
        task.held_out_prompts, EVALUATION_SAMPLES, task.max_response_tokens, task.eos, generator
    )
    right = task.rewards(responses, task.held_out_answers)
    correct = right.sum(1).int().tolist()
    answers = {(q, *responses[q, g].tolist()) for q, g in right.nonzero().tolist()}
    return {
        "pass_at_1": round(pass_at_k(correct, EVALUATION_SAMPLES, 1), 4),
        "pass_at_16": round(pass_at_k(correct, EVALUATION_SAMPLES, 16), 4),
        "unique_correct": len(answers),
        "entropy": round(float(-logprobs[counted].mean()), 4),
    }


def run(trainer: ToyTrainer, num_steps: int, evaluation_seed: int) -> dict[str, Any]:
    """Train; return evaluations at the start and during the run, figures of step control, and seconds."""
    evaluated = {round(part * num_steps) for part in _EVALUATED}
    begun = time.monotonic()
    evaluations = [{"step": 0} | evaluate(trainer.model, trainer.task, evaluation_seed)]
    steps = []
    for step in range(1, num_steps + 1):
        steps.append(trainer.step())
        if step in evaluated:
            evaluations.append({"step": step} | evaluate(trainer.model, trainer.task, evaluation_seed))
    return {
        "evaluations": evaluations,
        "frac_steps_controlled": sum(s["kept"] < 1 for s in steps) / num_steps,
        "mean_kept": round(sum(s["kept"] for s in steps) / num_steps, 4),
        "median_share_of_budget": round(sorted(s["share_of_budget"] for s in steps)[num_steps // 2], 4),
        "seconds": round(time.monotonic() - begun, 1),
    }
