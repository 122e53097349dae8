"""Episodes in real processes, with a scripted policy in the engine's place: tokens, masks, versions, limits."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from quatro_ray.config import EnvironmentConfig
from quatro_ray.engines.tiny_tokenizer import make_tokenizer
from quatro_ray.environments.episode import Episode
from quatro_ray.environments.registry import check_environments, episode_workers
from quatro_ray.errors import ConfigError
from quatro_ray.failures import EnvironmentFailed
from quatro_ray.isolation.worker_pool import ProcessPool
from quatro_ray.types import DropReason, Query, Rollout, SamplingParams, VersionSpan
from tests.children import none_left, workers
from tests.make import config as run_config
from tests.make import needs_sandbox

pytestmark = pytest.mark.process

QUERY = Query("q", "12+34=", "46", source="sums")
TOKENIZER = make_tokenizer()
FUNCTIONS = """
import asyncio, os, signal, socket, time

def calculator(query, policy, *, prefix="="):
    while (turn := policy.generate(stop=["]"])) is not None:
        if not turn.text.endswith("]"):
            return {"right": float(turn.text == query.answer), "tokens": len(turn.text)}
        policy.give(prefix)
        policy.give(str(eval(turn.text[1:-1])))

async def slowly(query, policy):
    await asyncio.sleep(0)
    return float(policy.generate().text == query.answer)

def obey(query, policy):
    turn = policy.generate()
    match turn.text:
        case "hang": time.sleep(600)
        case "leave": os._exit(3)
        case "fill": return len(bytearray(8 << 30))
        case "raise": raise RuntimeError("out of order")
        case "text": return "seven"
        case "connect": socket.create_connection(("127.0.0.1", 22), 2)
        case "write": open("/etc/quatro_ray", "w")
        case "pid": return os.getpid()
        case "again":
            while True: policy.generate()
    policy.give("!")
    return 0.0 if policy.generate() is None else 1.0

def hang_at_once(query, policy):
    time.sleep(600)

def give_first(query, policy):
    policy.give("x" * int(query.answer))
    policy.generate()

def other_each_time(query, policy, *, memory):
    number = len(open(memory).read())
    open(memory, "a").write("x")
    for _ in range(2 - number):
        policy.generate()
    if number == 0: time.sleep(600)

def silent(query, policy): ...
"""


class Script:
    """An engine that says what it is told, each turn under the next version."""

    def __init__(self, *turns: str, hang_at: int | None = None) -> None:
        self._turns = turns
        self._hang_at = hang_at
        self.calls: list[tuple[list[int], SamplingParams, list[str]]] = []

    async def complete(self, token_ids: Sequence[int], sampling: SamplingParams, stop: Sequence[str]) -> Rollout:
        number = len(self.calls)
        self.calls.append((list(token_ids), sampling, list(stop)))
        if number == self._hang_at:
            await asyncio.sleep(600)
        text = self._turns[number]
        tokens = [*TOKENIZER.encode(text), *([] if stop and text.endswith(stop[0]) else [TOKENIZER.eos_token_id])]
        finish = "length" if len(tokens) > sampling.max_tokens else "stop"
        tokens = tokens[: sampling.max_tokens]
        return Rollout(
            np.array(tokens, dtype=np.int32),
            np.full(len(tokens), -0.5 - number, dtype=np.float32),
            (VersionSpan(10 + number, 0, len(tokens)),),
            TOKENIZER.decode(tokens, skip_special_tokens=True),
            finish,
        )


@pytest.fixture
def functions(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(FUNCTIONS)
    return path


def config(functions: Path, name: str, **over: Any) -> EnvironmentConfig:
    tree = {"function": f"{functions}:{name}", "num_workers": 2, "turn_deadline_s": 2, "memory_mib": 512} | over
    return EnvironmentConfig.model_validate(tree)


def episode(settings: EnvironmentConfig, engine: Script, *, max_tokens: int = 40, query: Query = QUERY) -> Episode:
    sampling = SamplingParams(1.0, 1.0, max_tokens, seed=7)
    return Episode(settings, TOKENIZER, engine, query, TOKENIZER.encode(query.prompt), sampling)


def with_pool(settings: EnvironmentConfig, work: Callable[[ProcessPool], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        pool = episode_workers(settings)
        await pool.start(1)
        try:
            return await asyncio.wait_for(work(pool), 120)
        finally:
            await pool.close()

    with none_left():
        return asyncio.run(run())


def play(settings: EnvironmentConfig, engine: Script, **over: Any) -> Rollout:
    return with_pool(settings, lambda pool: episode(settings, engine, **over).play(pool))


def test_tokens_are_never_encoded_again_and_what_was_given_is_masked(functions: Path) -> None:
    engine = Script("[12+34]", "46")
    rollout = play(config(functions, "calculator"), engine)
    parts = [TOKENIZER.encode("[12+34]"), TOKENIZER.encode("=46"), [*TOKENIZER.encode("46"), TOKENIZER.eos_token_id]]
    assert rollout.token_ids.tolist() == [token for part in parts for token in part]
    assert rollout.is_sampled().tolist() == [True] * 7 + [False] * 3 + [True] * 3
    assert rollout.versions().tolist() == [10] * 7 + [-1] * 3 + [11] * 3
    assert rollout.spans == (VersionSpan(10, 0, 10), VersionSpan(11, 10, 13))
    assert rollout.behavior_logprobs.tolist() == [-0.5] * 7 + [0.0] * 3 + [-1.5] * 3
    assert (rollout.text, rollout.transcript) == ("46", "[12+34]=4646<eos>")
    assert (rollout.finish_reason, rollout.num_turns, rollout.num_sampled) == ("stop", 2, 10)
    assert rollout.environment == {"right": 1.0, "tokens": 2.0}
    prompt = TOKENIZER.encode(QUERY.prompt)
    assert [c[0] for c in engine.calls] == [prompt, prompt + parts[0] + parts[1]]
    assert [c[1].max_tokens for c in engine.calls] == [40, 30]
    assert engine.calls[0][1].seed != engine.calls[1][1].seed
    assert engine.calls[0][2] == ["]"]


def test_an_async_function_and_a_plain_number(functions: Path) -> None:
    assert play(config(functions, "slowly"), Script("46")).environment == {"reward": 1.0}


def test_out_of_turns_and_out_of_tokens(functions: Path) -> None:
    settings = config(functions, "calculator", max_turns=3)
    endless = ["[1+1]"] * 10
    rollout = play(settings, engine := Script(*endless), max_tokens=100)
    assert (rollout.finish_reason, rollout.num_turns, len(engine.calls), rollout.environment) == ("length", 3, 3, {})
    rollout = play(settings, Script(*endless), max_tokens=12)  # the second turn is cut: 5 + 2 + 5 of 12
    assert (rollout.finish_reason, rollout.num_tokens, rollout.text) == ("length", 12, "[1+1]")
    rollout = play(settings, Script(*endless), max_tokens=9)
    assert (rollout.finish_reason, rollout.num_tokens, rollout.text, rollout.environment["right"]) == (
        "length", 9, "[1", 0.0,
    )  # fmt: skip
    rollout = play(config(functions, "calculator", params={"prefix": "x" * 60}), Script(*endless))
    assert (rollout.finish_reason, rollout.num_tokens, rollout.num_turns) == ("length", 5, 1)


def test_a_function_that_ends_its_process_is_no_verdict_on_the_episode(functions: Path) -> None:
    settings = config(functions, "obey", num_workers=1)

    async def work(pool: ProcessPool) -> None:
        with pytest.raises(EnvironmentFailed, match="twice: the worker ended with 3; the function must not end"):
            await episode(settings, Script("leave", "leave")).play(pool)

    with_pool(settings, work)


@pytest.mark.parametrize("text", ["hang", "fill"])
def test_limits_used_up_twice_end_the_episode_and_no_turn_is_sampled_twice(functions: Path, text: str) -> None:
    settings = config(functions, "obey", num_workers=1)

    async def work(pool: ProcessPool) -> None:
        engine = Script(text)
        rollout = await episode(settings, engine).play(pool)
        assert (rollout.finish_reason, rollout.text, rollout.environment) == ("exhausted", text, {})
        assert rollout.response.exhausted
        assert len(engine.calls) == 1
        assert pool.num_replaced == 2
        assert (await episode(settings, Script("a", "b")).play(pool)).environment == {"reward": 1.0}

    with_pool(settings, work)


@pytest.mark.parametrize(
    ("function", "script", "message"),
    [
        ("obey", ["raise"], "RuntimeError: out of order"),
        ("obey", ["text"], "must return a number, numbers by name, or None, not 'seven'"),
        ("obey", ["again"] * 30, "was called after it returned None"),
        ("hang_at_once", [], "before the first turn"),
        ("give_first", [], "the policy has sampled nothing"),
        ("silent", [], "the policy has sampled nothing"),
    ],
)
def test_what_the_environment_does_wrong_is_never_a_reward(
    functions: Path, function: str, script: list[str], message: str
) -> None:
    with pytest.raises(EnvironmentFailed, match=message) as raised:
        play(config(functions, function), Script(*script))
    assert raised.value.reason is DropReason.ENVIRONMENT_ERROR


def test_what_is_given_before_the_first_turn_is_context(functions: Path) -> None:
    rollout = play(config(functions, "give_first"), Script("hello"), query=Query("q", "1=", "4"))
    assert rollout.versions().tolist() == [-1] * 4 + [10] * 6
    assert (rollout.spans, rollout.num_turns) == ((VersionSpan(10, 0, 10),), 1)


def test_an_episode_has_a_deadline_and_leaves_nothing_behind(functions: Path) -> None:
    settings = config(functions, "calculator", episode_deadline_s=1, num_workers=1)

    async def work(pool: ProcessPool) -> None:
        with pytest.raises(EnvironmentFailed, match="missed episode_deadline_s=1") as raised:
            await episode(settings, Script("[1+1]", hang_at=1)).play(pool)
        assert raised.value.reason is DropReason.ENVIRONMENT_TIMEOUT

    with_pool(settings, work)


def test_a_process_killed_from_outside_is_not_the_policys_fault(functions: Path) -> None:
    settings = config(functions, "obey", num_workers=1, turn_deadline_s=60)

    async def work(pool: ProcessPool) -> None:
        playing = asyncio.create_task(episode(settings, Script("hang")).play(pool))
        await asyncio.sleep(0.5)
        (busy,) = workers("quatro_ray.environments.worker")
        os.kill(busy.pid, signal.SIGKILL)
        with pytest.raises(EnvironmentFailed, match="ended with -9"):
            await playing

    with_pool(settings, work)


def test_an_environment_that_does_otherwise_when_played_again_is_told(functions: Path, tmp_path: Path) -> None:
    (tmp_path / "memory").write_text("")
    settings = config(functions, "other_each_time", params={"memory": str(tmp_path / "memory")})
    with pytest.raises(EnvironmentFailed, match="took 1 turns instead of 2: it must depend on its arguments alone"):
        play(settings, Script("a", "b"))


def test_processes_serve_many_episodes_and_are_recycled(functions: Path) -> None:
    settings = config(functions, "obey", num_workers=1, recycle_after=2)

    async def work(pool: ProcessPool) -> list[float]:
        return [(await episode(settings, Script("pid")).play(pool)).environment["reward"] for _ in range(3)]

    first, second, third = with_pool(settings, work)
    assert first == second != third


@needs_sandbox
@pytest.mark.parametrize("text", ["connect", "write"])
def test_inside_the_sandbox(functions: Path, text: str) -> None:
    functions.parent.chmod(0o755)  # it is read as nobody
    settings = config(functions, "obey", sandbox=True, turn_deadline_s=10)
    with pytest.raises(EnvironmentFailed, match="Error"):
        play(settings, Script(text))
    assert play(settings, Script("a", "b")).environment == {"reward": 1.0}
    assert not Path("/etc/quatro_ray").exists()


def test_functions_that_cannot_be_called_say_so_at_the_start(functions: Path) -> None:
    for name, params, message in [
        ("nothing", {}, "has no function 'nothing'"),
        ("calculator", {"suffix": 1}, r"cannot be called with \(query, policy, suffix=…\)"),
    ]:
        settings = config(functions, name, params=params)
        with pytest.raises(ConfigError, match=f"environments.mine: .*{message}"):
            check_environments({"mine": settings})
        with pytest.raises(ConfigError, match=message):
            with_pool(settings, lambda pool: asyncio.sleep(0))


@pytest.mark.parametrize(
    ("train", "held_out", "rewards", "message"),
    [
        ("calc", "calc", {"kind": "environment"}, None),
        ("calc", None, {"kind": "integer"}, "the source 'sums' has different environments in train and eval"),
        (
            "abacus",
            "abacus",
            {"kind": "integer"},
            r"the environment 'abacus', and environments has \['calc'\]",
        ),
        (None, None, {"kind": "environment"}, "rewards.answer takes what an episode returned, and the source 'sums'"),
    ],
)
def test_rules(
    functions: Path, train: str | None, held_out: str | None, rewards: dict[str, Any], message: str | None
) -> None:
    def build() -> None:
        run_config(
            data={
                "train": {"sums": {"kind": "chain_sum", "environment": train}},
                "eval": {"sums": {"kind": "chain_sum", "seed": 1, "environment": held_out}},
            },
            rewards={"answer": rewards},
            environments={"calc": {"function": f"{functions}:calculator"}},
        )

    if message is None:
        return build()
    with pytest.raises(ValidationError, match=message):
        build()
