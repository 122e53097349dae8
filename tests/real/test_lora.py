"""Adapters under ZeRO-3: what is trained, what a checkpoint holds, and what the exports are."""

from __future__ import annotations

import socket
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import load_file

from quatro_ray.config import LearnerConfig, LoraConfig, QuatroConfig
from quatro_ray.engines.learner_spec import LearnerSpec
from quatro_ray.engines.learning import LearningEngine
from quatro_ray.engines.policy import convert_checkpoint
from quatro_ray.replay.packing import pack
from quatro_ray.replay.staleness import Lineage
from quatro_ray.types import Query, Rollout, RolloutGroup, Score, VersionSpan

DEADLINE_S = 240
LORA = {"rank": 4, "alpha": 8}
SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-2,
    "dtype": "float32",
    "tokens_per_micro_batch": 64,
    "schedule": "cosine",
    "reference_kl_coef": 0.1,
    "lora": LORA,
}
NUM_STEPS = 2
"""Before the checkpoint, and after it."""
Scores = list[NDArray[np.float32]]


def on_ranks(work: Callable[[LearningEngine, Path], Any], folder: Path, count: int, **settings: Any) -> list[Any]:
    """Call the function in `count` processes, each with a started rank; `folder` has the model in `model`."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    config = LearnerConfig.model_validate(SETTINGS | {"num_ranks": count} | settings)
    with pytest.MonkeyPatch.context() as patch, ProcessPoolExecutor(count, get_context("spawn")) as pool:
        patch.setenv("OMP_NUM_THREADS", "1")
        calls = [pool.submit(_start_and_call, work, folder, config, rank, port) for rank in range(count)]
        return [call.result(timeout=DEADLINE_S) for call in calls]


def _start_and_call(
    work: Callable[[LearningEngine, Path], Any], folder: Path, config: LearnerConfig, rank: int, port: int
) -> Any:
    torch.set_num_threads(1)
    spec = LearnerSpec(
        model_path=str(folder / "model"),
        config=config,
        objective=QuatroConfig(kind="quatro"),
        device="cpu",
        temperature=1.0,
        max_response_tokens=9,
        seed=0,
        num_steps=2 * NUM_STEPS,
    )
    engine = LearningEngine(spec, rank=rank)
    engine.start("127.0.0.1", port)
    try:
        return work(engine, folder)
    finally:
        engine.shutdown()


def train(engine: LearningEngine, steps: range) -> list[dict[str, Any]]:
    """The metrics of each step; the data of step k is always the same."""
    return [dict(engine.train_step(_batch(engine, step), step)) for step in steps]


def _batch(engine: LearningEngine, step: int) -> Any:
    rng = np.random.default_rng(step)

    def rollout() -> Rollout:
        tokens = rng.integers(2, 200, int(rng.integers(2, 9))).astype(np.int32)
        logprobs = np.full(len(tokens), -5.3, np.float32)  # about those of a model with random weights
        return Rollout(tokens, logprobs, (VersionSpan(0, 0, len(tokens)),), "", "stop", Score(float(rng.integers(2))))

    prompt = np.arange(5, 9, dtype=np.int32)
    groups = [RolloutGroup(q, Query(str(q), "x", "y"), prompt, tuple(rollout() for _ in range(4))) for q in range(4)]
    config = engine._config
    return pack(
        groups,
        Lineage.unbroken(step),
        num_ranks=config.num_ranks // config.sequence_parallel_size,
        rank=engine.row_rank,
        tokens_per_micro_batch=config.tokens_per_micro_batch,
    )


def scores(engine: LearningEngine) -> Scores:
    return [scored.logprobs for scored in engine.score_fixed(40)]


@dataclass
class Life:
    """What a rank saw: names of parameters that are trained, scores at some times, and metrics of all steps."""

    trained: set[str]
    changed: set[str]
    start: Scores
    saved: Scores
    end: Scores
    again: Scores
    metrics: list[dict[str, Any]]
    metrics_again: list[dict[str, Any]]


def live(engine: LearningEngine, folder: Path) -> Life:
    """Train, save, train on and export; then load what was saved, and train on again."""
    policy = engine._loaded.policy
    trained = {name for name, parameter in policy.parameters_by_name().items() if parameter.requires_grad}
    before = {name: tensor.clone() for name, tensor in engine.weights}
    start, checkpoint = scores(engine), folder / "checkpoints" / "step_2"
    metrics = train(engine, range(NUM_STEPS))
    changed = {name for name, tensor in engine.weights if not torch.equal(tensor, before[name])}
    engine.save_checkpoint(checkpoint)
    saved = scores(engine)
    metrics += train(engine, range(NUM_STEPS, 2 * NUM_STEPS))
    end = scores(engine)
    engine.export(folder / "export")
    engine.load_checkpoint(checkpoint)
    assert all(np.array_equal(one, other) for one, other in zip(scores(engine), saved, strict=True))
    metrics_again = train(engine, range(NUM_STEPS, 2 * NUM_STEPS))
    return Life(trained, changed, start, saved, end, scores(engine), metrics, metrics_again)


def resume(engine: LearningEngine, folder: Path) -> tuple[Scores, list[dict[str, Any]], Scores]:
    """Load the checkpoint of `live`; return the scores then, and metrics and scores of the steps that follow."""
    engine.load_checkpoint(folder / "checkpoints" / "step_2")
    loaded = scores(engine)
    metrics = train(engine, range(NUM_STEPS, 2 * NUM_STEPS))
    return loaded, metrics, scores(engine)


@pytest.fixture(scope="module")
def folder(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lora")
    (path / "model").symlink_to(model_path)
    return path


@pytest.fixture(scope="module")
def life(folder: Path) -> Life:
    """Of two ranks."""
    first, second = on_ranks(live, folder, 2)
    assert first.metrics == second.metrics
    return first


def own_scores(model: Any) -> Scores:
    """Those of a model from transformers or peft."""
    from quatro_ray.weight_sync.agreement import fixed_sequences

    found = []
    for ids in fixed_sequences(model.config.vocab_size, 40):
        tokens = torch.tensor(ids)
        with torch.no_grad():
            logprobs = model(input_ids=tokens[None, :-1]).logits[0].float().log_softmax(-1)
        found.append(logprobs.gather(1, tokens[1:, None])[:, 0].numpy())
    return found


def load(path: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def difference(one: Scores, other: Scores) -> float:
    return float(np.abs(np.concatenate(one) - np.concatenate(other)).max())


def test_only_adapters_are_trained_from_the_model_itself(life: Life, folder: Path) -> None:
    assert {name.split(".")[-3] for name in life.trained} == {"lora_A", "lora_B"}
    assert len(life.trained) == 2 * 7 * 2  # all linear layers of two layers; not the embedding, which is the head too
    assert {name.split(".")[-2] for name in life.changed} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    assert difference(life.start, own_scores(load(folder / "model"))) < 1e-5
    assert difference(life.start, life.end) > 1e-2


def test_the_reference_policy_is_the_one_without_adapters(life: Life) -> None:
    kl = [metrics["policy/reference_kl"] for metrics in life.metrics]
    assert kl[0] == 0 and min(kl[1:]) > 1e-6


def test_a_step_is_held_to_its_budget(life: Life) -> None:
    second = life.metrics[1]
    assert second["step_control/acted"] == 1 and second["step_control/kept"] < 1
    assert 0.5 < second["step_control/share_of_budget"] < 1.42


def test_training_goes_on_bit_for_bit(life: Life) -> None:
    assert life.metrics_again == life.metrics[NUM_STEPS:]
    assert difference(life.again, life.end) == 0


def test_one_rank_takes_over(life: Life, folder: Path) -> None:
    ((loaded, metrics, end),) = on_ranks(resume, folder, 1)
    assert difference(loaded, life.saved) < 1e-5
    assert difference(end, life.end) < 2e-3
    for one, other in zip(metrics, life.metrics[NUM_STEPS:], strict=True):
        assert one["step/grad_norm"] == pytest.approx(other["step/grad_norm"], rel=1e-2)


def test_checkpoints_hold_adapters_alone(life: Life, folder: Path) -> None:
    saved = sum(file.stat().st_size for file in (folder / "checkpoints" / "step_2").glob("*optim_states.pt"))
    num_adapter = sum(
        tensor.numel() for tensor in load_file(folder / "export" / "adapter" / "adapter_model.safetensors").values()
    )
    assert saved < 14 * num_adapter + 50_000


def test_exports_are_the_policy_in_both_formats(life: Life, folder: Path) -> None:
    import peft

    export = folder / "export"
    assert difference(own_scores(load(export)), life.end) < 1e-5
    with_adapter = peft.PeftModel.from_pretrained(load(folder / "model"), export / "adapter")
    assert difference(own_scores(with_adapter), life.end) < 1e-5
    by_peft = with_adapter.merge_and_unload().state_dict()
    for name, tensor in load_file(export / "model.safetensors").items():
        torch.testing.assert_close(tensor, by_peft[name], atol=1e-6, rtol=1e-5)


def test_a_checkpoint_becomes_a_folder_like_an_export(life: Life, folder: Path, tmp_path: Path) -> None:
    convert_checkpoint(folder / "checkpoints", "step_2", folder / "model", tmp_path, LoraConfig.model_validate(LORA))
    assert difference(own_scores(load(tmp_path)), life.saved) < 1e-5
