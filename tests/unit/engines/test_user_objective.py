"""The user's own loss and advantage: what they get, what they may return, and how each mistake is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from quatro_ray.config import GrpoConfig, UserObjectiveConfig
from quatro_ray.engines.batches import Prepared, StepBatch, TokenBatch
from quatro_ray.engines.objective_check import check_objective
from quatro_ray.engines.objective_trial import problem_of
from quatro_ray.engines.objectives import make_objective
from quatro_ray.errors import ConfigError, ObjectiveError

GOOD_LOSS = "def loss(batch): return -batch.log_ratio() * batch.advantage\n"
STEP = StepBatch(
    rewards=torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64),
    valid=torch.tensor([[True, True], [True, False]]),
    rollout_index=torch.tensor([0, 1, 1, 2]),
    staleness=torch.zeros(4, dtype=torch.int64),
    log_ratio=None,
)
TOKENS = TokenBatch(
    policy_logprobs=torch.tensor([-1.0, -2.0, -0.5], requires_grad=True),
    behavior_logprobs=torch.tensor([-1.0, -1.5, -0.5]),
    advantage=torch.tensor([1.0, -1.0, 0.0]),
    is_response=torch.tensor([True, True, True]),
    rollout_index=torch.tensor([0, 1, 2]),
    staleness=torch.zeros(3, dtype=torch.int64),
    num_cells=4,
)


def user(tmp_path: Path, code: str, **settings: Any) -> UserObjectiveConfig:
    """A configuration with the function `loss` of `code`, and `advantage` if there is one."""
    path = tmp_path / "mine.py"
    path.write_text("import torch\n" + (code if "def loss" in code else GOOD_LOSS + code))
    if "def advantage" in code:
        settings = {"advantage": f"{path}:advantage"} | settings
    return UserObjectiveConfig(kind="user", **{"loss": f"{path}:loss"} | settings)


def problem(tmp_path: Path, code: str, **settings: Any) -> str:
    found = problem_of(user(tmp_path, code, **settings))
    assert found is not None
    assert "\n" not in found and "Traceback" not in found
    return found


@pytest.mark.parametrize(
    ("code", "settings"),
    [
        ("def loss(batch, clip=1): return -batch.log_ratio('sequence') * batch.advantage", {}),
        ("def loss(batch, *, clip): return -batch.log_ratio() * batch.advantage * clip", {"params": {"clip": 0.3}}),
        ("def loss(batch, **params):\n"
         "    print('hello')\n    return -batch.log_ratio() * batch.advantage * params['x']", {"params": {"x": 2}}),
        ("def advantage(batch, x): return x * (batch.rewards - batch.rewards.mean())", {"params": {"x": 2}}),
        ("def advantage(batch):\n    batch.rewards.sub_(1)\n    return batch.rewards.int()", {}),
        ("def advantage(batch): return batch.rewards * batch.per_rollout(batch.log_ratio)", {"needs_log_ratio": True}),
        ("def advantage(batch): return torch.where(batch.valid, batch.rewards, torch.nan)", {}),
    ],
)  # fmt: skip
def test_functions_that_are_good(tmp_path: Path, code: str, settings: dict[str, Any]) -> None:
    assert problem_of(user(tmp_path, code, **settings)) is None


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("def loss(batch): return batch.log_ratio().mean()", "returned a tensor [] of float32 on cpu with gradient"),
        ("def loss(batch): return None", "returned None, but must return the loss of each token, float [N] = ["),
        ("def loss(batch): return -batch.proximal_logprobs * batch.advantage", "must return a loss with gradient"),
        ("def loss(batch): return batch.policy_logprobs * 0", "its gradient is zero for every token"),
        ("def loss(batch): return batch.policy_logprobs / batch.advantage",
         "the loss of a token of a prompt is nan (policy_logprobs 0"),
        ("def loss(batch): return batch.log_ratio() / batch.log_ratio().detach() * batch.advantage",
         "the loss of a token of a prompt is nan (policy_logprobs 0"),
        ("def loss(batch): return batch.log_ratio().abs().sqrt() * batch.advantage",
         "the gradient of a token of a response is nan (policy_logprobs -0.7"),
        ("def loss(batch): return batch.policy_logprobs, batch.policy_logprobs", "`limited` of a TokenLoss must be"),
        ("def loss(batch): return -batch.policy_logprobs * batch.advantage / batch.is_response.sum()",
         "changed with the other rollouts in its micro-batch"),
        ("def loss(batch):\n    raise ValueError('odd\\nthing')", "raised ValueError: odd thing ("),
        ("def loss(batch, clip): return batch.policy_logprobs", "has the signature (batch, clip), but must take"),
        ("def loss(): return 1", "has the signature (), but must take (batch)"),
        ("def advantage(batch): return batch.rewards[0]", "of float64 on cpu without gradient, but must return the"),
        ("def advantage(batch): return 0.0", "returned 0.0, but must return the advantage of each rollout, [Q, G]"),
        ("def advantage(batch): return batch.rewards / batch.rewards.std(1, keepdim=True)",
         "returned nan for query 1, but advantages must be finite (rewards of this query: 0, 0, 0)"),
        ("def advantage(batch): return batch.rewards / batch.rewards[batch.valid].std()",
         "it was called on a made-up batch in which all rewards are equal"),
        ("def advantage(batch): return torch.rand_like(batch.rewards)", "when it was called again"),
        ("def advantage(batch): return batch.rewards * batch.log_ratio", "raised TypeError"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_that_names_the_field(tmp_path: Path, code: str, expected: str) -> None:
    text = problem(tmp_path, code)
    field = "advantage" if "def advantage" in code else "loss"
    assert text.startswith(f"objective.{field}='{tmp_path}/mine.py:{field}'")
    assert expected in text


def test_names_that_are_not_there(tmp_path: Path) -> None:
    assert "has no function 'lose'" in problem(tmp_path, GOOD_LOSS, loss=f"{tmp_path}/mine.py:lose")
    assert "importing it failed: ModuleNotFoundError" in problem(tmp_path, GOOD_LOSS, loss="no_such_module_here:loss")
    assert "importing it failed: ZeroDivisionError" in problem(tmp_path, GOOD_LOSS + "1 / 0\n")


def test_params_that_no_function_takes(tmp_path: Path) -> None:
    text = problem(tmp_path, "def loss(batch, *, clip=1): return batch.policy_logprobs", params={"clp": 1})
    assert text == "objective.params={'clp': 1}: the loss does not take clp; remove it or correct its spelling"
    both = GOOD_LOSS + "def advantage(batch): return batch.rewards"
    assert "neither function takes clp" in problem(tmp_path, both, params={"clp": 1})


@pytest.mark.process
def test_a_process_of_its_own_lets_functions_print_exit_and_crash(tmp_path: Path) -> None:
    check_objective(GrpoConfig(kind="grpo"))
    prints = "import os\nprint('at import')\n"
    check_objective(user(tmp_path, prints + "def loss(batch):\n    print(batch); os.write(1, b'x')\n"
                                            "    return -batch.policy_logprobs * batch.advantage"))  # fmt: skip
    for code, expected in [
        ("def loss(batch): raise ValueError('odd')", r"raised ValueError: odd \(.*mine.py:2, in loss\)"),
        ("def loss(batch): raise SystemExit(3)", r"called exit\(3\)"),
        ("import os\ndef loss(batch): os._exit(7)", "ends the process with status 7"),
    ]:
        with pytest.raises(ConfigError, match=expected):
            check_objective(user(tmp_path, code))


def test_results_are_checked_in_training_too(tmp_path: Path) -> None:
    code = "def advantage(batch): return batch.rewards / (batch.rewards != 5)\ndef loss(batch): return batch.advantage"
    made = make_objective(user(tmp_path, code))
    assert made.prepare(STEP).advantage.tolist() == [[1.0, 0.0], [1.0, 0.0]]
    five = replace(STEP, rewards=torch.full((2, 2), 5.0, dtype=torch.float64))
    with pytest.raises(ObjectiveError, match=r"returned inf for query 0.*rewards of this query: 5, 5"):
        made.prepare(five)
    with pytest.raises(ObjectiveError, match="without gradient, but must return a loss with gradient"):
        made.token_loss(TOKENS, 0.0)
    with torch.no_grad():
        loss, limited = made.token_loss(TOKENS, 0.0)  # a step that changes nothing is measured like this
    assert loss.tolist() == [1.0, -1.0, 0.0] and limited.tolist() == [False] * 3


def test_cells_without_a_rollout_have_no_advantage_and_rewards_stay_as_they_are(tmp_path: Path) -> None:
    made = make_objective(user(tmp_path, "def advantage(batch):\n    batch.rewards.sub_(1)\n    return batch.rewards"))
    assert made.prepare(STEP).advantage.tolist() == [[0.0, -1.0], [0.0, 0.0]]
    assert STEP.rewards.tolist() == [[1.0, 0.0], [1.0, 0.0]]


def test_an_advantage_of_zero_takes_no_step(tmp_path: Path) -> None:
    made = make_objective(user(tmp_path, "def advantage(batch): return (batch.rewards - 1) * (batch.rewards > 0)"))
    assert not made.prepare(STEP).is_informative()
    assert not Prepared(torch.full((2, 2), 1e-17, dtype=torch.float64)).is_informative()
    assert Prepared(torch.tensor([[0.0, 1e-6]], dtype=torch.float64)).is_informative()


def test_without_an_advantage_it_is_grpos(tmp_path: Path) -> None:
    made = make_objective(user(tmp_path, GOOD_LOSS))
    torch.testing.assert_close(
        made.prepare(STEP).advantage, make_objective(GrpoConfig(kind="grpo")).prepare(STEP).advantage
    )
