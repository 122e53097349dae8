"""Reward models in real vLLM engines, against transformers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Qwen2Config, Qwen2ForSequenceClassification

from quatro_ray.actors.reward_model import RewardModelActor
from quatro_ray.chats import chat_prompt
from quatro_ray.config import ModelRewardConfig
from quatro_ray.engines.reward_model import RewardModelEngine
from quatro_ray.engines.tiny_tokenizer import make_tokenizer
from quatro_ray.errors import ConfigError
from quatro_ray.failures import RewardUnavailable
from quatro_ray.rewards.reward_model_client import ModelReward
from quatro_ray.types import Query, Response

MAX_TOKENS = 96
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TORCHDYNAMO_DISABLE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</{{ m['role'] }}>\n{% endfor %}"
CHAT = chat_prompt([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 1+1?"}])


def save_reward_model(path: Path, num_labels: int = 1) -> str:
    """Random weights, with a score head large enough that a sigmoid would show."""
    torch.manual_seed(3)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    model = Qwen2ForSequenceClassification(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=512,
            pad_token_id=tokenizer.pad_token_id,
            num_labels=num_labels,
        )
    )
    torch.nn.init.normal_(model.score.weight, std=0.7)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def config_of(path: str) -> ModelRewardConfig:
    return ModelRewardConfig(
        kind="model", path=path, max_tokens=MAX_TOKENS, dtype="float32", kv_cache_gib=0.1, timeout_s=60
    )


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_reward_model(tmp_path_factory.mktemp("reward_model"))


@pytest.fixture(scope="module")
def expected(reward_model: str) -> Any:
    """The logit of a text by transformers."""
    tokenizer = AutoTokenizer.from_pretrained(reward_model)
    model = AutoModelForSequenceClassification.from_pretrained(reward_model, dtype=torch.float32).eval()

    def logit(text: str) -> float:
        ids = torch.tensor([tokenizer.encode(text)[-MAX_TOKENS:]])
        with torch.no_grad():
            return float(model(input_ids=ids).logits.item())

    return logit


@pytest.fixture(scope="module")
def started(reward_model: str) -> Iterator[tuple[RewardModelEngine, asyncio.AbstractEventLoop]]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        loop = asyncio.new_event_loop()
        engine = RewardModelEngine(config_of(reward_model), device="cpu")
        loop.run_until_complete(asyncio.wait_for(engine.start(), 300))
        yield engine, loop
        loop.run_until_complete(asyncio.wait_for(engine.shutdown(), 60))
        loop.close()


def score(started: tuple[RewardModelEngine, asyncio.AbstractEventLoop], *texts: tuple[str, str]) -> list[float]:
    engine, loop = started

    async def run() -> list[float]:
        return await asyncio.gather(*(engine.score(*t) for t in texts))

    return loop.run_until_complete(asyncio.wait_for(run(), 120))


def test_plain_texts_score_as_in_transformers(started: Any, expected: Any) -> None:
    texts = [("1+1=", "2"), ("1+1=", "3"), ("", "naïve 东 🙂"), ("a long prompt " * 4, "x" * 30)]
    wanted = [expected(p + r) for p, r in texts]
    assert max(wanted) - min(wanted) > 0.5 and any(not 0 <= w <= 1 for w in wanted)  # logits, and not all the same
    assert score(started, *texts) == pytest.approx(wanted, abs=1e-3)


def test_chats_are_rendered_with_the_models_own_template(started: Any, expected: Any) -> None:
    rendered = "<system>Be brief.</system>\n<user>What is 1+1?</user>\n<assistant>2</assistant>\n"
    assert score(started, (CHAT, "2")) == pytest.approx([expected(rendered)], abs=1e-3)


def test_the_beginning_is_cut_off(started: Any, expected: Any) -> None:
    long = "".join(chr(ord("a") + i % 26) for i in range(300))
    cut = score(started, (long, "end"), ("", (long + "end")[-MAX_TOKENS:]), (long, ""))
    assert cut[:2] == pytest.approx([expected(long + "end")] * 2, abs=1e-3)
    assert cut[2] != pytest.approx(cut[0], abs=1e-3)


def test_nothing_to_score_is_refused_and_the_engine_lives_on(started: Any, expected: Any) -> None:
    with pytest.raises(ValueError, match="at least one token"):
        score(started, ("", ""))
    assert score(started, ("1+1=", "2")) == pytest.approx([expected("1+1=2")], abs=1e-3)


def test_models_without_one_score_are_refused(model_path: str, tmp_path: Path) -> None:
    two_labels = save_reward_model(tmp_path / "two", num_labels=2)
    for path, message in ((model_path, "ForSequenceClassification"), (two_labels, "one label; it has 2")):
        with pytest.raises(ConfigError, match=message):
            asyncio.run(RewardModelEngine(config_of(path), device="cpu").start())
    too_long = config_of(two_labels).model_copy(update={"path": save_reward_model(tmp_path / "1"), "max_tokens": 4096})
    with pytest.raises(ConfigError, match="at most the model's 512 positions"):
        asyncio.run(RewardModelEngine(too_long, device="cpu").start())


def test_the_reward_asks_real_actors(local_ray: None, reward_model: str, expected: Any) -> None:
    """Two handles to it all the same: the second is of an actor that is dead."""
    options: Any = {"num_cpus": 0, "max_concurrency": 100, "runtime_env": {"env_vars": ENVIRONMENT}}
    config = config_of(reward_model)
    made = RewardModelActor.options(**options)  # type: ignore[attr-defined]  # Ray adds it
    dead, alive = (made.remote(config, device="cpu") for _ in range(2))
    ray.get(alive.start.remote(), timeout=300)
    assert ray.get(alive.peak_rss_bytes.remote(), timeout=60) > 0
    ray.kill(dead)
    query, texts = Query("q", "1+1=", "2"), ["2", "3", "11", "no idea"]

    async def run() -> list[float]:
        reward = ModelReward(config, [dead, alive])
        return await asyncio.gather(*(reward(query, Response(t, 1, False)) for t in texts))

    async def late() -> None:
        await ModelReward(config.model_copy(update={"timeout_s": 1e-4}), [alive])(query, Response("2", 1, False))

    async def lost() -> None:
        await ModelReward(config, [dead, dead])(query, Response("2", 1, False))

    try:
        assert asyncio.run(run()) == pytest.approx([expected(query.prompt + t) for t in texts], abs=1e-3)
        with pytest.raises(RewardUnavailable, match=r"did not answer within timeout_s=0.0001 s"):
            asyncio.run(late())
        with pytest.raises(RewardUnavailable, match="none of 2 reward model engines answered"):
            asyncio.run(lost())
        ray.get(alive.shutdown.remote(), timeout=60)
    finally:
        ray.kill(alive)
