"""What it saves that an engine on CPU has one process (quatro_ray/engines/engine_args.py:cpu_args).

    python -m benchmarks.engine_process [--pairs 3]

Starts an engine as the runs do, and one with vLLM's usual worker process, in turn, and samples the same tokens from
both. It ends with one JSON line of medians of ratios, and exits 1 below 1.2 times the tokens a CPU-second.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.model_engines import ENV

WANTED = 1.2
_GROUPS, _GROUP_SIZE, _TOKENS = 8, 16, 128
_DEADLINE_S = 400
_IDLE_S = 5.0


def cpu_seconds() -> float:
    """Return the CPU time of this process and of all that it started."""
    import psutil

    own = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in [own, *own.children(recursive=True)])


async def measure(executor: str, folder: Path) -> dict[str, Any]:
    """Return times and a checksum of the sampled tokens.

    Args:
        executor: "mp" for a worker process, or "one" for the engine's own.
        folder: where the model is written.
    """
    from quatro_ray.config import GeneratorConfig, TinyModelConfig
    from quatro_ray.engines.generation import GenerationEngine
    from quatro_ray.engines.tiny_model import make_model, save_pretrained
    from quatro_ray.engines.tiny_tokenizer import make_tokenizer
    from quatro_ray.types import Query, SamplingParams

    tokenizer = make_tokenizer()
    save_pretrained(
        make_model(TinyModelConfig(kind="tiny", hidden_size=128, num_heads=4, num_layers=4), tokenizer, 0),
        tokenizer,
        folder,
    )
    config = GeneratorConfig(
        max_prompt_tokens=32,
        max_response_tokens=_TOKENS,
        dtype="float32",
        kv_cache_gib=0.1,
        max_num_seqs=64,
        engine_args={"distributed_executor_backend": "mp"} if executor == "mp" else {},
    )
    engine = GenerationEngine(str(folder), config, device="cpu", sync_backend="gloo", seed=0)
    begun = cpu_seconds()
    await engine.start()
    started = cpu_seconds()

    async def sample() -> list[list[int]]:
        groups = await asyncio.gather(
            *(
                engine.generate(i, Query(str(i), "12+34=", "46"), SamplingParams(1.0, 1.0, _TOKENS, i), _GROUP_SIZE)
                for i in range(_GROUPS)
            )
        )
        return [rollout.token_ids.tolist() for group in groups for rollout in group.rollouts]

    await sample()  # the first round compiles
    before, clock = cpu_seconds(), time.perf_counter()
    tokens = await sample()
    num, cpu, wall = sum(map(len, tokens)), cpu_seconds() - before, time.perf_counter() - clock
    before = cpu_seconds()
    await asyncio.sleep(_IDLE_S)
    idle = (cpu_seconds() - before) / _IDLE_S
    await engine.shutdown()
    return {
        "start_cpu_s": started - begun,
        "tokens_per_cpu_s": num / cpu,
        "tokens_per_s": num / wall,
        "idle_cores": idle,
        "tokens": hashlib.sha256(json.dumps(tokens).encode()).hexdigest(),
    }


def in_a_process(executor: str) -> dict[str, Any]:
    """Return what `measure` finds in a new process."""
    command = [sys.executable, "-m", "benchmarks.engine_process", "--one", executor]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=_DEADLINE_S, env=os.environ | ENV, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    """Print each pair, and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--one", choices=["one", "mp"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(asyncio.run(measure(arguments.one, Path(folder)))), flush=True)
        return 0
    pairs = []
    for _ in range(arguments.pairs):
        pairs.append((in_a_process("mp"), in_a_process("one")))
        print(json.dumps(pairs[-1]), flush=True)
    assert len({found["tokens"] for pair in pairs for found in pair}) == 1, "the tokens differ"
    figures = {
        f"{name}_ratio": round(statistics.median(one[name] / two[name] for two, one in pairs), 3)
        for name in ("tokens_per_cpu_s", "tokens_per_s", "start_cpu_s")
    }
    for i, name in enumerate(("mp", "one")):
        figures[f"idle_cores_{name}"] = round(statistics.median(pair[i]["idle_cores"] for pair in pairs), 3)
    print(json.dumps(figures))
    return 0 if figures["tokens_per_cpu_s_ratio"] >= WANTED else 1


if __name__ == "__main__":
    sys.exit(main())
