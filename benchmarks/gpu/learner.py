"""Step time, memory and numerical noise of one learner rank: `python -m benchmarks.gpu.learner`.

Trains random weights in the shape of a Qwen2.5 model on random rollouts. Each case runs in a process of its own, so
that peaks of memory do not mix. `noise` cases use a learning rate of 1e-12: the weights do not change, so the KL that
step control measures should be 0, and what it shows is the noise of the measurement.

`--cases tiny` runs on a CPU. The last line is JSON; the exit status is 1 if a case failed.
"""

from __future__ import annotations

import argparse
import json
import math
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from quatro_ray.config import LearnerConfig, QuatroConfig, StepControlConfig
from quatro_ray.engines.learner_spec import LearnerSpec
from quatro_ray.engines.learning import LearningEngine
from quatro_ray.replay.packing import pack
from quatro_ray.replay.staleness import Lineage
from quatro_ray.types import LearnerBatch, Query, Rollout, RolloutGroup, Score, VersionSpan

_H100_BF16_FLOPS = 989e12
"""Dense bfloat16 peak of an H100 SXM, from NVIDIA's data sheet."""
_PROMPT_TOKENS = 128
_DEADLINE_S = 100.0


@dataclass(frozen=True)
class Shape:
    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int


SHAPES = {
    "tiny": Shape(258, 64, 256, 2, 2, 1),
    "0.5b": Shape(151_936, 896, 4_864, 24, 14, 2),
    "1.5b": Shape(151_936, 1_536, 8_960, 28, 12, 2),
}


@dataclass(frozen=True)
class Case:
    """One configuration of the learner."""

    shape: str
    device: str = "cuda"
    response_tokens: int = 2_048
    """Tokens of the longest response."""
    shortest_share: float = 0.5
    """Lengths are uniform from this share of `response_tokens` upwards."""
    micro_tokens: int = 8_192
    groups: int = 4
    group_size: int = 4
    num_steps: int = 3
    learning_rate: float = 1e-6
    checkpointing: bool = False
    control: bool = True
    attention: str = "auto"
    offload: bool = False
    offload_parameters: bool = False
    dtype: str = "bfloat16"
    head_scale: float = 1.0
    """Factor on the embedding, which is tied to the head; a larger one makes peaked distributions."""


_SMALL = Case("tiny", device="cpu", response_tokens=48, micro_tokens=512, num_steps=2)
_MEDIUM, _LARGE = Case("0.5b"), Case("1.5b")
CASES = {
    "tiny": _SMALL,
    "tiny noise": replace(_SMALL, learning_rate=1e-12, head_scale=20.0),
    "0.5b": _MEDIUM,
    "0.5b noise": replace(_MEDIUM, learning_rate=1e-12),
    "0.5b noise, peaked": replace(_MEDIUM, learning_rate=1e-12, head_scale=20.0),
    "0.5b, no step control": replace(_MEDIUM, control=False),
    "0.5b, checkpointing": replace(_MEDIUM, checkpointing=True),
    "0.5b, short responses": replace(_MEDIUM, response_tokens=256, groups=16, group_size=8),
    "0.5b, rows of 2,304": replace(_MEDIUM, micro_tokens=2_304),
    "0.5b, masked attention": replace(_MEDIUM, attention="sdpa"),
    "1.5b": _LARGE,
    "1.5b noise": replace(_LARGE, learning_rate=1e-12),
    "1.5b, masked attention": replace(_LARGE, attention="sdpa"),
    "1.5b, checkpointing": replace(_LARGE, checkpointing=True),
    "1.5b, rows of 2,304": replace(_LARGE, micro_tokens=2_304),
    "1.5b, offload": replace(_LARGE, offload=True, offload_parameters=True),
    "1.5b, 16k tokens": replace(_LARGE, response_tokens=16_000, micro_tokens=16_384, groups=2, group_size=2),
    "0.5b, 32k tokens": replace(_MEDIUM, response_tokens=32_000, micro_tokens=32_640, groups=1, checkpointing=True),
    "1.5b, 32k tokens": replace(_LARGE, response_tokens=32_000, micro_tokens=32_640, groups=1, checkpointing=True),
}


def save_random_model(case: Case, path: str) -> int:
    """Write a Qwen2 model with random weights, and return its number of parameters."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = SHAPES[case.shape]
    config = Qwen2Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=True,
        max_position_embeddings=32_768,
    )
    torch.manual_seed(0)
    with torch.device(case.device):
        model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(case.head_scale)
    model.save_pretrained(path)
    return sum(p.numel() for p in model.parameters())


def make_engine(case: Case, path: str) -> LearningEngine:
    control = StepControlConfig() if case.control else StepControlConfig(window_kl_nats_per_token=None)
    config = LearnerConfig(
        num_ranks=1,
        learning_rate=case.learning_rate,
        dtype=case.dtype,
        tokens_per_micro_batch=case.micro_tokens,
        gradient_checkpointing=case.checkpointing,
        attn_implementation=case.attention,
        offload="cpu" if case.offload else "none",
        offload_parameters=case.offload_parameters,
        step_control=control,
    )
    spec = LearnerSpec(
        model_path=path,
        config=config,
        objective=QuatroConfig(kind="quatro"),
        device="cuda" if case.device == "cuda" else "cpu",
        temperature=1.0,
        max_response_tokens=case.response_tokens,
        seed=0,
        num_steps=100,
    )
    engine = LearningEngine(spec, rank=0)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    engine.start("127.0.0.1", port)
    return engine


def random_batch(case: Case, version: int, rng: np.random.Generator) -> LearnerBatch:
    """Return random tokens with random rewards of 0 and 1, as if sampled from the uniform distribution."""
    vocab = SHAPES[case.shape].vocab

    def tokens(count: int) -> np.ndarray:
        return rng.integers(2, vocab, count).astype(np.int32)

    def rollout() -> Rollout:
        count = int(rng.integers(round(case.shortest_share * case.response_tokens), case.response_tokens + 1))
        logprobs = np.full(count, -math.log(vocab), np.float32)
        score = Score(float(rng.integers(0, 2)))
        return Rollout(tokens(count), logprobs, (VersionSpan(version, 0, count),), "", "stop", score=score)

    prompt = _PROMPT_TOKENS if case.device == "cuda" else 16
    groups = [
        RolloutGroup(i, Query(str(i), "", ""), tokens(prompt), tuple(rollout() for _ in range(case.group_size)))
        for i in range(case.groups)
    ]
    return pack(groups, Lineage.unbroken(version), num_ranks=1, rank=0, tokens_per_micro_batch=case.micro_tokens)


def run_step(case: Case, engine: LearningEngine, rng: np.random.Generator, num_parameters: int) -> dict[str, Any]:
    """Train one step and return its figures; model FLOPs are 6 per parameter and token, without attention."""
    batch = random_batch(case, engine.version, rng)
    num_tokens = sum(len(micro.token_ids) for micro in batch.micro_batches)
    start = time.perf_counter()
    metrics: Mapping[str, Any] = engine.train_step(batch, engine.version)
    if case.device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    figures: dict[str, Any] = {
        "seconds": round(seconds, 3),
        "tokens": num_tokens,
        "tokens_per_s": round(num_tokens / seconds),
        "micro_batches": len(batch.micro_batches),
        "applied": not metrics["step/skipped"],
    }
    if case.device == "cuda":
        figures["mfu"] = round(6 * num_parameters * num_tokens / seconds / _H100_BF16_FLOPS, 4)
        figures["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    figures |= {k: float(np.mean(v)) for k, v in metrics.items() if k.startswith("step_control/")}
    return figures


def run_case(name: str) -> dict[str, Any]:
    """Run one case in this process."""
    case, rng = CASES[name], np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as path:
        num_parameters = save_random_model(case, path)
        start = time.perf_counter()
        engine = make_engine(case, path)
        start_s = round(time.perf_counter() - start, 1)
        steps = [run_step(case, engine, rng, num_parameters) for _ in range(case.num_steps)]
        engine.shutdown()
    return {"case": name, **asdict(case), "parameters": num_parameters, "start_s": start_s, "figures": steps}


def run_apart(name: str) -> dict[str, Any]:
    """Run one case in a process of its own, and return its result or the last line of its error."""
    command = [sys.executable, "-m", "benchmarks.gpu.learner", "--here", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DEADLINE_S)
    except subprocess.TimeoutExpired:
        return {"case": name, "failed": f"took longer than {_DEADLINE_S:g} s"}
    if done.returncode:
        return {"case": name, "failed": (done.stderr.strip().splitlines() or ["no output"])[-1][-400:]}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="b", help="run the cases whose names contain this")
    parser.add_argument("--here", help="run this one case in this process")
    options = parser.parse_args()
    if options.here:
        print(json.dumps(run_case(options.here)))
        return 0
    if torch.cuda.is_available():
        print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    results = []
    for name in (n for n in CASES if options.cases in n):
        results.append(run_apart(name))
        print(json.dumps(results[-1]), flush=True)
    print(json.dumps({"cases": results}))
    return int(not results or any("failed" in r for r in results))


if __name__ == "__main__":
    sys.exit(main())
