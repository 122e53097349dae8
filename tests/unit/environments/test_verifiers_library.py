"""Environments of the `verifiers` library: their rows as queries, their rollouts as episodes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from quatro_ray.chats import chat_prompt
from quatro_ray.config import EnvironmentConfig, VerifiersSourceConfig
from quatro_ray.data.chat_template import encode_prompt
from quatro_ray.data.verifiers_library import verifiers_rows
from quatro_ray.engines.tiny_tokenizer import make_tokenizer
from quatro_ray.environments import verifiers_library
from quatro_ray.environments.episode import Episode
from quatro_ray.environments.registry import load_environment
from quatro_ray.errors import ConfigError
from quatro_ray.failures import EnvironmentFailed
from quatro_ray.types import Query, Rollout, SamplingParams
from tests.unit.data.test_chat_template import CHATML
from tests.unit.environments.test_environments import Script, with_pool

pytestmark = pytest.mark.process

GUESS = """
import verifiers as vf
from datasets import Dataset

class Guess(vf.MultiTurnEnv):
    '''Which digit is it?'''

    async def env_response(self, messages, state, **kwargs):
        if self.message_type == "completion":
            said, reply = messages.strip()[-1], lambda text: text + ";"
        else:
            said, reply = messages[-1]["content"].strip(), lambda text: [{"role": "user", "content": text}]
            if said == "r":
                messages[1]["content"] = "another question"
            if said == "e":
                raise vf.ToolError("out of order")
        if said == state["answer"]:
            state["final_env_response"] = reply("right")
        return reply("right" if said == state["answer"] else "higher" if said < state["answer"] else "lower")

def found(completion, answer, **kwargs):
    text = completion if isinstance(completion, str) else completion[-1]["content"]
    return 0.5 * text.startswith("right") + 0.25

def load_environment(num=4, kind="chat", tools=False):
    prompt = "prompt" if kind == "completion" else "question"
    rows = Dataset.from_list([{prompt: f"digit {i}?", "answer": str(i), "info": {"i": i}} for i in range(num)])
    return Guess(
        dataset=rows, rubric=vf.Rubric(funcs=[found]), max_turns=3, message_type=kind,
        oai_tools=[{"type": "function", "function": {"name": "f"}}] if tools else None,
        **({"system_prompt": "one digit"} if kind == "chat" else {}),
    )
"""


@pytest.fixture(autouse=True)
def guess_env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "guess_env.py").write_text(GUESS)
    monkeypatch.syspath_prepend(tmp_path)  # processes of episodes look where this one does


def source(**over: Any) -> VerifiersSourceConfig:
    return VerifiersSourceConfig.model_validate(
        {"kind": "verifiers", "env": "guess-env", "environment": "guess"} | over
    )


def play(query: Query, *turns: str, max_tokens: int = 400, **args: Any) -> tuple[Rollout, Script]:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "<eos>")
    settings = EnvironmentConfig.model_validate(
        {
            "function": "quatro_ray.environments.verifiers_library:episode",
            "turn_deadline_s": 180,  # a fresh process loads the library first
            "params": {"env": "guess-env", "args": args},
            "memory_mib": 4096,
        }
    )
    engine, ids = Script(*turns), encode_prompt(tokenizer, query.prompt)
    sampling = SamplingParams(1.0, 1.0, max_tokens, seed=0)
    episode = Episode(settings, tokenizer, engine, query, ids, sampling)
    return with_pool(settings, episode.play), engine


def test_rows_become_queries() -> None:
    rows = verifiers_rows(source(args={"num": 5}, max_rows=3), "train.guess").queries
    assert [q.answer for q in rows] == ["0", "1", "2"]
    assert rows[1].prompt == chat_prompt(
        [{"role": "system", "content": "one digit"}, {"role": "user", "content": "digit 1?"}]
    )
    assert json.loads(rows[1].metadata["verifiers"])["info"] == {"i": 1}
    assert len(verifiers_rows(source(split="eval"), "eval.guess").queries) == 4  # the library falls back to train


def test_a_rollout_in_a_chat_is_one_line_of_tokens() -> None:
    query = verifiers_rows(source(), "train.guess").queries[3]
    rollout, engine = play(query, "1", "", "3")
    assert rollout.environment == {
        "reward": 0.25,
        "found": 0.25,
        "num_turns": 3.0,
    }  # max_turns=3: no word after the last
    assert rollout.transcript == (
        "1<eos>\n<|im_start|>user\nhigher<eos>\n<|im_start|>assistant\n"
        "<eos>\n<|im_start|>user\nhigher<eos>\n<|im_start|>assistant\n3<eos>"
    )
    assert rollout.num_sampled == 2 + 1 + 2
    assert [len(call[0]) for call in engine.calls] == sorted(len(call[0]) for call in engine.calls)
    at_once, _ = play(query, "3")
    assert at_once.environment == {"reward": 0.75, "found": 0.75, "num_turns": 1.0}


def test_a_rollout_of_plain_text() -> None:
    query = verifiers_rows(source(args={"kind": "completion"}), "train.guess").queries[2]
    rollout, _ = play(query, "5", "2", kind="completion")
    assert query.prompt == "digit 2?"
    assert rollout.transcript == "5<eos>lower;2<eos>"
    assert rollout.environment["num_turns"] == 2


def test_no_room_left_is_the_end_of_the_rollout_not_of_the_run() -> None:
    query = verifiers_rows(source(), "train.guess").queries[3]
    rollout, _ = play(query, "1", "2", max_tokens=40)
    assert (rollout.finish_reason, rollout.num_turns, rollout.environment["reward"]) == ("length", 1, 0.25)


@pytest.mark.parametrize(("said", "message"), [("r", "rewrote earlier turns"), ("e", "out of order")])
def test_what_the_environment_does_wrong_is_never_a_reward(said: str, message: str) -> None:
    query = verifiers_rows(source(), "train.guess").queries[3]
    with pytest.raises(EnvironmentFailed, match=message):
        play(query, said, "3")


def test_what_cannot_be_used_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="OpenAI tool calls"):
        verifiers_rows(source(args={"tools": True}), "train.guess")
    with pytest.raises(ConfigError, match="'no-such-env' cannot be loaded"):
        verifiers_rows(source(env="no-such-env"), "train.guess")
    with pytest.raises(ValidationError, match="environment is missing"):
        source(environment=None)
    monkeypatch.setitem(sys.modules, "verifiers", None)
    with pytest.raises(ConfigError, match=r"pip install 'verifiers==0\.1\.10'"):
        verifiers_rows(source(), "train.guess")


def test_the_old_name_of_the_module_still_works_and_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "quatro_ray.environments.verifiers", raising=False)
    with pytest.warns(DeprecationWarning, match="is now quatro_ray.environments.verifiers_library"):
        loaded = load_environment("quatro_ray.environments.verifiers:episode", {"env": "guess"})
    assert loaded is verifiers_library.episode
