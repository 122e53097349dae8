"""What arguments of engines do to the log-probs of sampled tokens: `python -m benchmarks.engine_arguments [NAME ...]`.

For each kind of engine on CPU, in a process of its own: responses are sampled from a small random model, all weights
change and are sent, and responses are sampled again. Each time it compares

- the engine's log-probs of the sampled tokens with the model's own in float32 (mean absolute difference, nats);
- what was sampled with the model's distribution: the sum of log p + entropy over the tokens, in standard deviations.

The last line is JSON. The exit status is 1 if an engine in float32 is off by more than 1e-3 nats, or its samples by
more than 4 standard deviations. Speculative decoding does not count: vLLM 0.32 is wrong with it on CPU, where a run
refuses it. The engine with weights in int8 needs the package torchao, and is left out without it.
"""

from __future__ import annotations

import asyncio
import copy
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.model_engines import DEADLINE_S, ENV, MAX_NATS, change, send, with_engine

_MAX_DEVIATIONS = 4.0
_PROMPTS, _RESPONSES, _TOKENS = 16, 8, 64
_SHARPNESS = 14.0
"""Factor of the last norm's weight: with sharp distributions responses repeat themselves, so drafts are accepted."""
_NGRAMS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 2}
KINDS: dict[str, dict[str, Any]] = {
    "one device": {},
    "tensor_parallel_size: 2": {"tensor_parallel_size": 2},
    "pipeline_parallel_size: 2": {"pipeline_parallel_size": 2},
    "data_parallel_size: 2": {"data_parallel_size": 2},
    "speculative decoding (n-grams)": {"engine_args": {"speculative_config": _NGRAMS}},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16, weights in int8 (torchao)": {"dtype": "bfloat16", "engine_args": {"quantization": "torchao"}},
}


def int8_arguments() -> dict[str, str]:
    """Return torchao's configuration as vLLM takes it."""
    from torchao.core.config import config_to_dict
    from torchao.quantization import Int8WeightOnlyConfig

    return {"quantization_config_dict_json": json.dumps(config_to_dict(Int8WeightOnlyConfig()))}


async def sample(engine: Any, seed: int) -> list[tuple[list[int], Any]]:
    """Return the prompt's tokens and the rollout of each response."""
    from quatro_ray.types import Query, SamplingParams

    def group(number: int) -> Any:
        prompt = f"{number}+1={number}+1="
        sampling = SamplingParams(1.0, 1.0, _TOKENS, seed + number)
        return engine.generate(number, Query(str(number), prompt, ""), sampling, _RESPONSES)

    groups = await asyncio.gather(*map(group, range(_PROMPTS)))
    return [([int(token) for token in g.prompt_token_ids], rollout) for g in groups for rollout in g.rollouts]


def compare(model: Any, sampled: list[tuple[list[int], Any]]) -> dict[str, float]:
    """Compare samples and their log-probs with the model's own distribution."""
    import torch

    off, excess, variance = 0.0, 0.0, 0.0
    for prompt, rollout in sampled:
        response = torch.as_tensor(rollout.token_ids, dtype=torch.long)
        ids = torch.cat([torch.tensor(prompt), response])[None]
        with torch.no_grad():
            logprobs = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        own = logprobs.gather(-1, response[:, None])[:, 0]
        mean = (logprobs.exp() * logprobs).sum(-1)
        off += float((own - torch.as_tensor(rollout.behavior_logprobs)).abs().sum())
        excess += float((own - mean).sum())
        variance += float(((logprobs.exp() * logprobs**2).sum(-1) - mean**2).sum())
    tokens = sum(rollout.num_tokens for _, rollout in sampled)
    return {"nats": off / tokens, "deviations": excess / variance**0.5, "tokens": tokens}


def measure(kind: str) -> dict[str, Any]:
    """Return what is found for one kind of engine, before and after an update."""
    import torch

    from quatro_ray.config import GeneratorConfig, TinyModelConfig
    from quatro_ray.engines.tiny_model import make_model, save_pretrained
    from quatro_ray.engines.tiny_tokenizer import make_tokenizer
    from quatro_ray.weight_sync.agreement import fixed_sequences

    settings = copy.deepcopy(KINDS[kind])
    if "quantization" in settings.get("engine_args", {}):
        settings["engine_args"]["hf_overrides"] = int8_arguments()
    settings |= {"deterministic": False, "max_response_tokens": _TOKENS, "max_num_seqs": 64}
    devices = GeneratorConfig.model_validate({"max_prompt_tokens": 1} | settings).devices_per_engine
    tokenizer = make_tokenizer()
    model = make_model(TinyModelConfig(kind="tiny", hidden_size=128, num_heads=4), tokenizer, 0).eval()
    with torch.no_grad():
        model.model.norm.weight *= _SHARPNESS
    found: dict[str, Any] = {}

    async def work(engine: Any) -> None:
        found["before"] = compare(model, await sample(engine, 0))
        sequences = fixed_sequences(model.config.vocab_size, _TOKENS)
        found["before"]["sampling_error"] = await engine.sampling_error(sequences)
        change(model)
        await asyncio.to_thread(send, model, engine, asyncio.get_running_loop(), devices)
        found["after"] = compare(model, await sample(engine, 1000))
        load = engine.load()
        found["accepted"] = load.num_accepted_tokens / max(1, load.num_draft_tokens)

    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, tokenizer, Path(folder))
        asyncio.run(with_engine(Path(folder), work, **settings))
    return found


def in_a_process(kind: str) -> dict[str, Any]:
    """Return what `measure` finds, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.engine_arguments", "--one", kind]
    environment = os.environ | ENV | {"TORCHDYNAMO_DISABLE": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, env=environment)
    except subprocess.TimeoutExpired:
        raise SystemExit(f"{kind}: not ready after {DEADLINE_S} s") from None
    for line in reversed(done.stdout.splitlines()):
        if line.startswith('{"before"'):
            found: dict[str, Any] = json.loads(line)
            return found
    raise SystemExit(f"{kind}: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")


def holds(kind: str, found: dict[str, Any]) -> bool:
    """Return whether an engine in float32 samples from the model's distribution and says with which log-probs."""
    parts = (found["before"], found["after"])
    same = all(part["nats"] < MAX_NATS and abs(part["deviations"]) < _MAX_DEVIATIONS for part in parts)
    return same or "bfloat16" in kind or "speculative" in kind


def main() -> int:
    """Print a table, and a line of JSON."""
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(sys.argv[2])), flush=True)
        return 0
    if unknown := set(sys.argv[1:]) - set(KINDS):
        raise SystemExit(f"{', '.join(sorted(unknown))}: must be one of {', '.join(map(repr, KINDS))}")
    kinds = sys.argv[1:] or list(KINDS)
    if any("torchao" in kind for kind in kinds) and importlib.util.find_spec("torchao") is None:
        kinds = [kind for kind in kinds if "torchao" not in kind]
        print("torchao is not installed: no engine with weights in int8")
    if not kinds:
        raise SystemExit("nothing was measured")
    print("| engine | nats before an update | after | deviations before | after | drafts accepted |\n|" + "---|" * 6)
    results = {}
    for kind in kinds:
        found = results[kind] = in_a_process(kind)
        nats, deviations = ([found[when][what] for when in ("before", "after")] for what in ("nats", "deviations"))
        accepted = f"{found['accepted']:.0%}" if found["accepted"] else "–"
        print(
            f"| {kind} | {nats[0]:.1e} | {nats[1]:.1e} | {deviations[0]:+.1f} | {deviations[1]:+.1f} | {accepted} |",
            flush=True,
        )
    good = all(holds(kind, found) for kind, found in results.items())
    print(json.dumps({"holds": good, "engines": results}))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
