"""A custom loss and advantage: two functions, and a few lines of configuration. Run it from the project's root:

    .venv/bin/python examples/own_objective.py

It trains the tiny model of examples/own_prompts for a few steps. In a configuration file the lines are

    objective:
      kind: user
      advantage: examples/own_objective.py:advantage
      loss: examples/own_objective.py:loss
      params: {upper: 2.0, negative_weight: 0.5}

docs/algorithm.md has the fields and shapes of the batches.
"""

import torch

from quatro_ray.algorithms.losses import TokenLoss
from quatro_ray.engines.batches import StepBatch, TokenBatch


def advantage(batch: StepBatch) -> torch.Tensor:
    """Return the group's centred rewards over their deviation in the whole batch, [Q, G], as REINFORCE++ does."""
    mean = (batch.rewards * batch.valid).sum(1, keepdim=True) / batch.valid.sum(1, keepdim=True)
    centred = (batch.rewards - mean) * batch.valid
    deviation = (centred.square().sum() / batch.valid.sum()).sqrt()
    return centred / (deviation + 1e-6)


def loss(batch: TokenBatch, *, upper: float = 2.0, negative_weight: float = 0.5) -> TokenLoss:
    """Return a policy gradient that weighs failures less than successes, with truncated importance weights, [N]."""
    ratio = batch.log_ratio().detach().exp()
    scale = torch.where(batch.advantage < 0, negative_weight, 1.0)
    return TokenLoss(-ratio.clamp(max=upper) * scale * batch.advantage * batch.policy_logprobs, ratio > upper)


if __name__ == "__main__":
    import sys
    from pathlib import Path

    from quatro_ray.config import load_config
    from quatro_ray.jobs.train import train

    here = "examples/own_objective.py"
    overrides = [
        f"objective={{kind: user, advantage: '{here}:advantage', loss: '{here}:loss', params: {{upper: 2.0}}}}",
        "run.dir=runs/own_objective",
        "run.num_steps=3",
        *sys.argv[1:],
    ]
    print(f"report: {train(load_config(Path('examples/own_prompts/config.yaml'), overrides))}")
