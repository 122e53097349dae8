"""A user's function as a reward: where it is found, how it is called, what it may return, and how a failure is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from quatro_ray.errors import ConfigError
from quatro_ray.failures import NoVerdict, RewardUnavailable
from quatro_ray.isolation.user_function import UserFunctionError, load_function
from quatro_ray.rewards.python_function import PythonReward
from quatro_ray.types import Outcome, Query, Response
from tests.unit.rewards.test_rewards import make
from tests.unit.rewards.test_workers import reward_configs, scores, with_scorer

QUERY = Query("q", "12+34=", "46", {"level": 3, "data_source": "sums", "extra_info": {"index": 7}})
CHAT = Query("q", '[{"role": "user", "content": "12+34="}]', "46")


def reward(tmp_path: Path, code: str) -> PythonReward:
    path = tmp_path / f"mine{len(list(tmp_path.iterdir()))}.py"
    path.write_text(code)
    made = make("python", function=f"{path}:f")
    assert isinstance(made, PythonReward)
    return made


@pytest.mark.parametrize(
    ("code", "value"),
    [
        ("def f(query, response): return response.text == query.answer", 1),
        ("def f(q, r, *, strict=True): return q.metadata['level']", 3),
        ("async def f(query, response): return 0.5", 0.5),
        ("def f(query, response): return None", None),
        ("def f(data_source, solution_str, ground_truth, extra_info):\n"
         "    return (data_source, solution_str, ground_truth, extra_info) == ('sums', '46', '46', {'index': 7})", 1),
        ("def f(data_source, solution_str, ground_truth, extra_info=None, **kwargs): return {'score': 0.25}", 0.25),
        ("def f(solution_str, ground_truth, data_source): return solution_str == ground_truth", 1),
        ("def f(completions, **kwargs): return [float(len(c)) for c in completions]", 2),
        ("def f(prompts, completions, answer, level): return [(prompts, completions, answer, level)"
         " == (['12+34='], ['46'], ['46'], [3])]", 1),
        ("async def f(completions, **kwargs): return [None]", None),
        ("class F:\n    def __call__(self, query, response): return 4\nf = F()", 4),
    ],
)  # fmt: skip
def test_signatures(tmp_path: Path, code: str, value: float | None) -> None:
    assert reward(tmp_path, code)(QUERY, Response("46", 2, False)) == value


def test_trl_gets_chats_as_messages(tmp_path: Path) -> None:
    code = "def f(prompts, completions, **kwargs): return [prompts[0][-1]['content'] + completions[0][0]['content']]"
    with pytest.raises(TypeError, match=r"must return a number or None, not \['12\+34=46'\]"):
        reward(tmp_path, code)(CHAT, Response("46", 2, False))


@pytest.mark.parametrize("signature", ["text", "", "a, b, c", "*, query, response"])
def test_a_function_that_cannot_be_called_is_refused_at_the_start(tmp_path: Path, signature: str) -> None:
    with pytest.raises(ConfigError, match=r"must take \(query, response\), verl's"):
        reward(tmp_path, f"def f({signature}): return 1")


def test_a_failure_tells_file_line_and_traceback(tmp_path: Path) -> None:
    mine = reward(tmp_path, "def g(x):\n    return 1 / x\n\ndef f(query, response):\n    return g(0)\n")
    with pytest.raises(UserFunctionError) as caught:
        mine(QUERY, Response("46", 2, False))
    lines = str(caught.value).splitlines()
    file = tmp_path / "mine0.py"
    assert lines[-1] == f"{file}:f raised ZeroDivisionError: division by zero ({file}:2, in g)"
    assert f'File "{file}", line 5, in f' in lines[0]
    with pytest.raises(ConfigError, match=r"importing it failed: ZeroDivisionError: .* \(.*mine1.py:2, in <module>\)"):
        reward(tmp_path, "x = 0\n1 / x\n")


def test_a_module_of_the_working_directory_is_found(tmp_path: Path) -> None:
    (tmp_path / "my_rewards_of_here.py").write_text("def starts_with(query, response): return 1.0\n")
    code = (
        "import sys; sys.path = [p for p in sys.path if p]\n"
        "from quatro_ray.isolation.user_function import load_function\n"
        "print(load_function('my_rewards_of_here:starts_with')(None, None))"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(root)}, capture_output=True, text=True
    )
    assert (done.stdout.strip(), done.returncode) == ("1.0", 0), done.stderr


def test_imports_within_functions_are_made_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def f(query, response):\n    import colorsys, no_such_module_here\n    from wave import open\n    return 1\n"
    )
    for name in ("colorsys", "wave"):
        sys.modules.pop(name, None)
    load_function(f"{tmp_path}/mine.py:f")
    assert {"colorsys", "wave"} <= sys.modules.keys()


@pytest.mark.process
def test_what_a_worker_tells_of_a_function(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "def f(query, response):\n    print('saw', response.text)\n"
        "    if response.text == 'raise': raise ValueError('odd')\n    return None if response.text == 'none' else 1\n"
    )
    rewards = reward_configs(mine={"kind": "python", "function": f"{path}:f"})

    async def work(scorer: Any) -> None:
        (good,) = await scores(scorer, "good")
        assert (good.reward, good.outcome, good.printed) == (1, Outcome.OK, "saw good\n")
        with pytest.raises(RewardUnavailable, match=rf"rewards.mine: (?s:.*)odd \({path}:3, in f\)$"):
            await scores(scorer, "raise")
        with pytest.raises(NoVerdict, match=r"rewards\.mine returned None"):
            await scores(scorer, "none")

    with_scorer(rewards, work, num_workers=1)
