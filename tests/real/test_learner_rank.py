"""One ZeRO-3 rank in a process of its own, without Ray: passes of a step, checkpointing, and sums of gradients."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.gpu.learner import Case, make_engine, random_batch, save_random_model
from quatro_ray.engines.learning import LearningEngine

CASE = Case("tiny", "cpu", 64, 0.5, 512, groups=4, group_size=4, learning_rate=1e-2, dtype="float32")
DEADLINE_S = 180


def on_a_rank(work: Callable[[LearningEngine], Any], case: Case) -> Any:
    """Call the function with a started engine; a process can join a group of ranks only once."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_start_and_call, work, case).result(timeout=DEADLINE_S)


def _start_and_call(work: Callable[[LearningEngine], Any], case: Case) -> Any:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as path:
        save_random_model(case, path)
        engine = make_engine(case, path)
        try:
            return work(engine)
        finally:
            engine.shutdown()


def train_and_score(engine: LearningEngine) -> tuple[float, list[np.ndarray]]:
    batch = random_batch(CASE, 0, np.random.default_rng(0))
    metrics: Any = engine.train_step(batch, 0)
    assert metrics["step_control/kept"] < 1  # step control has moved the weights back
    return metrics["step/grad_norm"], engine.logprobs(batch)


@pytest.fixture(scope="module")
def plain() -> tuple[float, list[np.ndarray]]:
    """Gradient norm of a step, and log-probs after it."""
    result: tuple[float, list[np.ndarray]] = on_a_rank(train_and_score, CASE)
    return result


@pytest.mark.parametrize(
    "settings",
    [{"checkpointing": True}, {"offload": True}, {"offload": True, "offload_parameters": True}],
    ids=["checkpointing", "offload", "offload_parameters"],
)
def test_what_saves_memory_changes_no_number(settings: dict[str, bool], plain: tuple[float, list[np.ndarray]]) -> None:
    """ZeRO-3 gathers the weights of a layer again when it is recomputed."""
    norm, logprobs = plain
    norm_again, logprobs_again = on_a_rank(train_and_score, replace(CASE, **settings))  # type: ignore[arg-type]
    assert norm_again == pytest.approx(norm, rel=1e-5) and norm > 0
    for one, other in zip(logprobs, logprobs_again, strict=True):
        np.testing.assert_allclose(other, one, atol=1e-4)


def norms_of_means(engine: LearningEngine) -> dict[int, float]:
    """The gradient of one sequence, as the mean of so many micro-batches of it."""
    zero, tokens = engine._loaded.engine, torch.arange(40)
    found = {}
    for count in (1, 300):
        for number in range(1, count + 1):
            zero.set_gradient_accumulation_boundary(number == count)
            zero.backward(zero(tokens, tokens, tokens.roll(-1))[0].mean() / count)
        zero.step()
        found[count] = float(zero.get_global_grad_norm() or 0.0)
    return found


def test_gradients_are_summed_in_float32() -> None:
    """A sum in bfloat16 is off by 2 percent here."""
    norms = on_a_rank(norms_of_means, replace(CASE, dtype="bfloat16", learning_rate=1e-12))
    assert norms[300] == pytest.approx(norms[1], rel=2e-3)


LONG = Case("tiny", "cpu", 400, 0.9, 2048, groups=3, group_size=8, learning_rate=1e-6, dtype="float32")


def tokens_of_passes(engine: LearningEngine) -> tuple[int, list[int]]:
    """Tokens of the batch, prompts included, and of each forward pass of its step."""
    passes: list[int] = []
    decoder = engine._loaded.policy.causal_lm.get_decoder()
    decoder.register_forward_pre_hook(lambda _, __, given: passes.append(given["input_ids"].numel()), with_kwargs=True)
    batch = random_batch(LONG, 0, np.random.default_rng(0))
    engine.train_step(batch, 0)
    return sum(len(micro.token_ids) for micro in batch.micro_batches), passes


def test_a_step_passes_over_its_tokens_once_and_over_the_probe_twice() -> None:
    """The probe is one of eight rollouts of each query, about 390 tokens."""
    total, passes = on_a_rank(tokens_of_passes, LONG)
    assert total <= sum(passes) <= 1.35 * total
    total, passes = on_a_rank(tokens_of_passes, replace(LONG, control=False))
    assert total <= sum(passes) <= 1.2 * total
