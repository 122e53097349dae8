"""A vLLM engine that loads adapters by themselves: scores, running requests, and the version of each token."""

from __future__ import annotations

import asyncio
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from quatro_ray.config import GeneratorConfig, LoraConfig, TinyModelConfig
from quatro_ray.engines.generation import GenerationEngine
from quatro_ray.engines.lora import Adapters, peft_names
from quatro_ray.engines.tiny_model import make_model, save_pretrained
from quatro_ray.engines.tiny_tokenizer import make_tokenizer
from quatro_ray.types import Query, SamplingParams
from quatro_ray.weight_sync.agreement import fixed_sequences

LORA = LoraConfig(rank=4, alpha=8, sync="adapter")
TOKENS = 256


@dataclass
class Seen:
    """Scores under the versions 0, 1 and 2; rollouts as (start, end) by version; versions that were reported."""

    scores: list[list[list[float]]]
    spans: list[list[tuple[int, int, int]]]
    sampling_error: float
    reported: list[int]


async def use(folder: Path, adapters: list[dict[str, torch.Tensor]]) -> Seen:
    fields = {"max_prompt_tokens": 16, "max_response_tokens": TOKENS, "dtype": "float32", "kv_cache_gib": 0.1}
    config = GeneratorConfig.model_validate(fields)
    engine = GenerationEngine(str(folder), config, device="cpu", sync_backend="gloo", seed=0, adapter=LORA)
    try:
        await engine.start()
        sequences = fixed_sequences(engine.llm.model_config.get_vocab_size(), 40)
        scores = [await engine.score(sequences)]
        reported = []
        query = Query("q", "1+1=", "2")
        running = [
            asyncio.ensure_future(engine.generate(i, query, SamplingParams(1.0, 1.0, TOKENS, i), 4)) for i in range(4)
        ]
        for version, tensors in enumerate(adapters, start=1):
            sampled = engine.load().num_sampled_tokens
            while engine.load().num_sampled_tokens < sampled + 200 and not all(task.done() for task in running):
                await asyncio.sleep(0.005)
            await engine.receive_weights()
            engine.receive_adapter(tensors)
            reported.append((await engine.install_weights(version)).version)
            scores.append(await engine.score(sequences))
        groups = await asyncio.gather(*running)
        error = await engine.sampling_error(sequences)
    finally:
        await engine.shutdown()
    spans = [[(s.version, s.start, s.end) for s in r.spans] for group in groups for r in group.rollouts]
    return Seen(scores, spans, error, reported)


def in_this_process(folder: Path, adapters: list[dict[str, torch.Tensor]]) -> Seen:
    torch.set_num_threads(1)
    return asyncio.run(use(folder, adapters))


def own_scores(model: Any, sequences: list[list[int]]) -> list[list[float]]:
    found = []
    for ids in sequences:
        tokens = torch.tensor(ids)
        with torch.no_grad():
            logprobs = model(input_ids=tokens[None, :-1]).logits[0].log_softmax(-1)
        found.append(logprobs.gather(1, tokens[1:, None])[:, 0].tolist())
    return found


def difference(one: list[list[float]], other: list[list[float]]) -> float:
    return float(np.abs(np.concatenate(one) - np.concatenate(other)).max())


def test_requests_continue_under_each_new_adapter(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    save_pretrained(make_model(TinyModelConfig(kind="tiny"), tokenizer, 1), tokenizer, tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    sequences = fixed_sequences(model.config.vocab_size, 40)
    expected, sent = [own_scores(model, sequences)], []
    adapters = Adapters(model, LORA)
    with adapters.measured():  # gives them random values
        pass
    for factor in (1.0, -3.0):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_B." in name:
                    parameter.mul_(factor)
        expected.append(own_scores(model, sequences))
        sent.append({name: tensor.clone() for name, tensor in peft_names(model.state_dict()).items()})
    environment = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "CUDA_VISIBLE_DEVICES": ""}
    with pytest.MonkeyPatch.context() as patch, ProcessPoolExecutor(1, get_context("spawn")) as pool:
        for name, value in environment.items():
            patch.setenv(name, os.environ.get(name, value))
        seen = pool.submit(in_this_process, tmp_path, sent).result(timeout=400)

    assert seen.reported == [1, 2]
    for found, right in zip(seen.scores, expected, strict=True):
        assert difference(found, right) < 1e-4
    assert difference(expected[0], expected[1]) > 1e-2 and difference(expected[1], expected[2]) > 1e-2
    # some requests met both updates, and every token has the version that sampled it
    versions = [[version for version, _, _ in spans] for spans in seen.spans]
    assert [0, 1, 2] in versions
    for spans in seen.spans:
        assert spans[0][1] == 0 and all(one[2] == other[1] for one, other in pairwise(spans))
    assert seen.sampling_error < 1e-4
