"""A bonus on entropy whose coefficient adapts, so that the entropy of the policy stays near a target.

Source: adaptive entropy control of Skywork-OR1, arXiv 2505.22312. There the coefficient acts only while the
entropy is below the target; here it falls to 0 above it, step by step.
"""

from __future__ import annotations


class EntropyControl:
    """The controller of a run's entropy.

    Args:
        target_nats: entropy per token that is wanted.
        coef_step: change of the coefficient after each optimiser step.

    Attributes:
        coef: weight of the entropy in the loss, ≥ 0; its whole state for a checkpoint.
    """

    def __init__(self, target_nats: float, coef_step: float) -> None:
        self._target_nats, self._coef_step = target_nats, coef_step
        self.coef = 0.0

    def observe(self, entropy_nats: float) -> None:
        """Raise the coefficient if the entropy per token of a step's batch is below the target, else lower it."""
        change = self._coef_step if entropy_nats < self._target_nats else -self._coef_step
        self.coef = max(0.0, self.coef + change)
