"""The coefficient on a policy whose entropy is known."""

import pytest
import torch

from quatro_ray.algorithms.entropy_control import EntropyControl


def test_the_coefficient_rises_below_the_target_and_falls_to_zero_above_it() -> None:
    control = EntropyControl(target_nats=0.3, coef_step=0.01)
    seen = []
    for entropy in (0.5, 0.2, 0.1, 0.4, 0.3, 0.9):
        control.observe(entropy)
        seen.append(control.coef)
    assert seen == pytest.approx([0.0, 0.01, 0.02, 0.01, 0.0, 0.0])


def test_it_holds_a_collapsing_policy_near_its_target() -> None:
    """A loss that prefers one of eight tokens ends at entropy 0 without control, and near the target with it."""
    ends = []
    for controlled in (False, True):
        control = EntropyControl(target_nats=0.5, coef_step=0.02)
        logits = torch.zeros(8, requires_grad=True)
        optimizer = torch.optim.Adam([logits], lr=0.05)
        for _ in range(1500):
            log_p = torch.log_softmax(logits, -1)
            entropy = -(log_p.exp() * log_p).sum()
            loss = -log_p.exp()[3] - (control.coef if controlled else 0.0) * entropy
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            control.observe(float(entropy.detach()))
        ends.append(float(entropy.detach()))
    assert ends[0] < 0.01
    assert ends[1] == pytest.approx(0.5, abs=0.1)
