"""Step control against a KL that is known: quadratic, or saturating far out."""

import math

import pytest
import torch

from quatro_ray.algorithms.step_control import ProbeKl, StepControl, StepLimits, StepReport, rollout_kl
from quatro_ray.errors import TrainingDiverged


def test_rollout_kl_golden() -> None:
    """Two rollouts; ρ = e and 1 with π_k/β = 1, then ρ = 1/e with π_k/β = e², cut at 2; padding counts nothing."""
    start = torch.tensor([-3.0, -1.0, -1.0, 0.0])
    stepped = torch.tensor([-2.0, -1.0, -2.0, 5.0])
    behavior = torch.tensor([-3.0, -1.0, -3.0, 0.0])
    response = torch.tensor([True, True, True, False])
    got = rollout_kl(stepped, start, behavior, response, torch.tensor([0, 0, 1, -1]), 2)
    assert got.tolist() == pytest.approx([math.e - 2, 2 * math.exp(-1)])


def test_rollout_kl_estimates_the_kl_of_two_distributions() -> None:
    torch.manual_seed(0)
    start, stepped = torch.log_softmax(torch.randn(2, 5, dtype=torch.float64) * 0.3, dim=-1)
    samples = torch.multinomial(start.exp(), 200_000, replacement=True)
    index = torch.arange(len(samples))
    got = rollout_kl(stepped[samples], start[samples], start[samples], index >= 0, index, len(samples)).mean()
    exact = (start.exp() * (start - stepped)).sum()
    assert float(got) == pytest.approx(float(exact), rel=0.02)


def test_budget_falls_with_staleness_from_its_ceiling() -> None:
    limits = StepLimits(window_kl_nats=0.1, max_kl_nats=0.02)
    assert limits.budget(torch.tensor([0.0, 4.0, 9.0, 99.0])).tolist() == pytest.approx([0.02, 0.02, 0.01, 0.001])


class Line:
    """Weights on a line: KL(α) = `kl`(α · length)."""

    def __init__(self, kl: object, length: float) -> None:
        self.kl, self.length, self.kept, self.measured_at = kl, length, 1.0, math.nan

    def measure(self) -> ProbeKl:
        self.measured_at = self.kept
        value = self.kl(self.kept * self.length)  # type: ignore[operator]
        return ProbeKl(torch.tensor([value], dtype=torch.float64), torch.zeros(1, dtype=torch.float64))

    def move_to(self, kept: float) -> None:
        self.kept = kept


LIMITS = StepLimits(window_kl_nats=1.0, max_kl_nats=0.01)


def control(line: Line, controller: StepControl | None = None) -> StepReport:
    return (controller or StepControl(LIMITS)).control(line.measure, line.move_to)


def test_a_step_within_its_budget_is_left_alone() -> None:
    line = Line(lambda x: x * x, 0.1)
    report = control(line)
    assert (report.kept, line.kept, report.num_passes) == (1.0, 1.0, 1)
    assert report.metrics()["step_control/acted"] == 0.0


@pytest.mark.parametrize(("length", "passes"), [(0.13, 1), (1.0, 2), (100.0, 3)])
def test_a_step_beyond_it_is_moved_back_to_it(length: float, passes: int) -> None:
    """KL is known to be x²: the fraction kept is the budget's root over the length."""
    line = Line(lambda x: x * x, length)
    report = control(line)
    assert line.kept == report.kept == pytest.approx(0.1 / length)
    assert report.num_passes == passes
    assert report.share_of_budget == pytest.approx(1)
    assert report.kl_nats.tolist() == pytest.approx([0.01])
    assert report.budget_nats.tolist() == [0.01]


LAWS = {
    "linear": lambda x: abs(x),
    "quadratic": lambda x: x * x,
    "fourth power": lambda x: x**4,
    "flat far out": lambda x: min(x * x, 0.5),
    "flat near 0": lambda x: max(0.0, abs(x) - 0.5) ** 2,
    "steep": lambda x: math.expm1(min(x, 300.0)) ** 2,
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("length", [0.11, 0.2, 1.0, 3.0, 30.0])
def test_no_law_of_the_kl_leaves_a_step_over_its_budget(law: str, length: float) -> None:
    """One controller takes 20 steps of similar length, so that it starts each one where it ended the last."""
    controller = StepControl(LIMITS)
    for step in range(20):
        line = Line(LAWS[law], length * (1 + 0.3 * math.sin(step)))
        report = control(line, controller)
        truth = LAWS[law](line.kept * line.length)
        assert truth <= 0.01 * (1.05 if line.measured_at == line.kept else math.sqrt(2)) * (1 + 1e-9)
        assert report.kept == line.kept
        if line.kept < 1 and line.measured_at == line.kept and law != "flat near 0":
            assert truth >= 0.01 * 0.5, "the step would be shorter than it need be"


@pytest.mark.parametrize("law", LAWS)
def test_it_never_ends_on_an_increase_that_was_not_measured(law: str) -> None:
    for kept in (1.0, 0.5, 0.03, 2e-4):
        controller = StepControl(LIMITS)
        controller.kept = kept
        line = Line(LAWS[law], 2.0)
        control(line, controller)
        assert line.kept <= line.measured_at


def test_the_next_step_is_measured_where_the_last_one_ended() -> None:
    controller = StepControl(LIMITS)
    control(Line(lambda x: x * x, 1.0), controller)
    again = control(Line(lambda x: x * x, 1.1), controller)
    assert (again.num_passes, again.kept) == (1, pytest.approx(0.1 / 1.1))


def test_it_lets_go_when_steps_become_small_again() -> None:
    controller = StepControl(LIMITS)
    control(Line(lambda x: x * x, 10.0), controller)
    line = Line(lambda x: x * x, 0.05)
    report = control(line, controller)
    assert (report.kept, line.kept) == (1.0, 1.0)
    still = Line(lambda x: 0.0, 1.0)  # no KL at all, as where every query is void
    assert control(still, controller).kept == 1.0


@pytest.mark.parametrize("floor", [0.0106, 0.02, 10.0])
def test_a_floor_above_the_budget_ends_the_run_instead_of_freezing_it(floor: float) -> None:
    """The KL of noise does not fall with the step, so the fraction kept would shrink for ever."""
    controller = StepControl(LIMITS)
    with pytest.raises(TrainingDiverged, match=r"stand still.*max_kl_nats_per_token"):
        for _ in range(500):
            control(Line(lambda x: floor + x * x, 0.2), controller)


def test_a_step_that_fits_at_the_smallest_fraction_grows_from_there() -> None:
    controller = StepControl(LIMITS)
    controller.kept = 1e-4
    assert control(Line(lambda x: x * x, 700.0), controller).kept == pytest.approx(0.1 / 700)
    steep = Line(lambda x: 0.01 * (x / 3e-4) ** 4, 1.0)
    assert control(steep).kept == pytest.approx(3e-4, rel=0.1)


def test_a_learning_rate_that_is_far_too_high_ends_the_run() -> None:
    with pytest.raises(TrainingDiverged, match=r"lower learner\.learning_rate"):
        control(Line(lambda x: x * x, 1e5))


@pytest.mark.parametrize("kl", [math.nan, math.inf])
def test_a_kl_that_is_not_finite_is_no_budget_kept(kl: float) -> None:
    with pytest.raises(TrainingDiverged, match="learning_rate"):
        control(Line(lambda x: kl, 1.0))


def test_the_mean_over_queries_decides() -> None:
    kl = torch.tensor([0.03, 0.001], dtype=torch.float64)
    probe = ProbeKl(kl, torch.tensor([0.0, 999.0], dtype=torch.float64))
    assert probe.share_of_budget(LIMITS) == pytest.approx((3 + 1) / 2)
