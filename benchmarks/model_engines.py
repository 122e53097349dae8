"""Which architectures vLLM's engine samples from as the learner trains them: a table for docs/models.md.

    python -m benchmarks.model_engines [--results FILE] [NAME ...]

For each tiny random model of benchmarks/models.py, in a process of its own, on CPU in float32:

- the engine loads the model, and its log-probs are compared with the model's own in transformers;
- all weights change and are sent by the back end of the runs, and the log-probs are compared again;
- the changed model is exported, and the export is loaded in transformers and in another engine, and compared.

What is in FILE is not measured again. It ends with one JSON line, and exits 1 if fewer than 25 architectures agree at
every stage. A run measures the first two stages itself, and ends if they disagree (weight_sync/agreement.py).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from benchmarks.models import ARCHITECTURES, make

STAGES = ("engine", "after an update", "export in transformers", "export in an engine")
DEADLINE_S = 400
_WANTED = 25
MAX_NATS = 1e-3
"""Mean difference of a log-prob beyond which two implementations disagree, float32."""
ENV = {"OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""Environment of an engine's process, which would take all cores otherwise."""
_MAX_TOKENS = 48
_CHANGE = 0.1
"""Standard deviation of what is added to each weight, relative to that of the tensor."""


def log_probs(model: Any, sequences: Sequence[list[int]]) -> list[list[float]]:
    """Return the model's own log-prob of each token but the first, nats, for sequences of T tokens each."""
    import torch

    found = []
    for tokens in sequences:
        ids = torch.tensor([tokens])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        found.append(logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0].tolist())
    return found


def difference(left: Sequence[Sequence[float]], right: Sequence[Sequence[float]]) -> float:
    """Return the mean absolute difference of two lists of log-probs, nats."""
    pairs = [abs(a - b) for x, y in zip(left, right, strict=True) for a, b in zip(x, y, strict=True)]
    return sum(pairs) / len(pairs)


async def with_engine(path: Path, work: Callable[[Any], Any], **settings: object) -> Any:
    """Start an engine on a model, and return what the coroutine `work` returns for it.

    Args:
        path: folder of the model.
        work: is called with the engine, once it is ready.
        settings: fields of `generator` other than the default ones.
    """
    from quatro_ray.config import GeneratorConfig
    from quatro_ray.engines.generation import GenerationEngine

    fields: dict[str, object] = {
        "max_prompt_tokens": _MAX_TOKENS,
        "max_response_tokens": 16,
        "dtype": "float32",
        "kv_cache_gib": 0.1,
        "deterministic": True,  # no cache of prefixes, which would keep the keys and values of older weights
    }
    config = GeneratorConfig.model_validate(fields | settings)
    engine = GenerationEngine(str(path), config, device="cpu", sync_backend="gloo", seed=0)
    try:
        await engine.start()
        return await work(engine)
    finally:
        await engine.shutdown()


def change(model: Any) -> None:
    """Add noise to every weight."""
    import torch

    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = parameter.std() if parameter.numel() > 1 else parameter.abs()
            parameter.add_(torch.randn_like(parameter) * _CHANGE * spread.nan_to_num())


def free_port() -> int:
    """Return a TCP port that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def send(model: Any, engine: Any, loop: asyncio.AbstractEventLoop, num_workers: int = 1) -> None:
    """Send all weights as version 1, under their names and in their layout on disk, as a learner of one rank does."""
    from quatro_ray.config import WeightSyncConfig
    from quatro_ray.engines.policy import as_on_disk
    from quatro_ray.weight_sync.sender import WeightSender
    from quatro_ray.weight_sync.zero_source import ZeroWeightSource

    def submit(engine: Any, method: str, *args: Any) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(getattr(engine, method)(*args), loop)

    def wait(futures: list[Future[Any]], seconds: float) -> None:
        for future in futures:
            future.result(seconds)

    source = ZeroWeightSource(dict(model.named_parameters()), lambda state: as_on_disk(model, state))
    sender = WeightSender(0, source, submit, wait)
    config = WeightSyncConfig(rendezvous_deadline_s=DEADLINE_S)
    sender.open("gloo", [engine], num_workers, "127.0.0.1", free_port(), config)
    wait([submit(engine, "receive_weights")], DEADLINE_S)
    sender.send(1)
    wait([submit(engine, "install_weights", 1)], DEADLINE_S)


def measure(name: str, folder: Path, *, with_export: bool = True) -> dict[str, float | str]:
    """Return the mean difference at each stage, nats, or the error that ended it.

    Args:
        name: an architecture.
        folder: where models are written.
        with_export: go on to the stages that load the export.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from quatro_ray.engines.model_files import write_model
    from quatro_ray.engines.policy import as_on_disk, persistent_buffers
    from quatro_ray.engines.tiny_tokenizer import make_tokenizer
    from quatro_ray.weight_sync.agreement import fixed_sequences

    model = make(name)
    sequences = fixed_sequences(model.config.get_text_config().vocab_size, _MAX_TOKENS)
    before, after = folder / "before", folder / "after"
    model.save_pretrained(before)
    make_tokenizer().save_pretrained(before)
    found: dict[str, float | str] = {}

    async def first(engine: Any) -> None:
        found["engine"] = difference(log_probs(model, sequences), await engine.score(sequences))
        change(model)
        await asyncio.to_thread(send, model, engine, asyncio.get_running_loop())
        found["after an update"] = difference(log_probs(model, sequences), await engine.score(sequences))

    async def second(engine: Any) -> None:
        found["export in an engine"] = difference(log_probs(model, sequences), await engine.score(sequences))

    def export() -> None:
        state = dict(model.named_parameters()) | persistent_buffers(model)
        write_model(after, as_on_disk(model, {k: v.detach().clone() for k, v in state.items()}), before)
        loaded = AutoModelForCausalLM.from_pretrained(after, dtype=torch.float32).eval()
        found["export in transformers"] = difference(log_probs(model, sequences), log_probs(loaded, sequences))

    steps: list[tuple[str, Callable[[], None]]] = [
        ("engine", lambda: asyncio.run(with_engine(before, first))),
        ("export in transformers", export),
        ("export in an engine", lambda: asyncio.run(with_engine(after, second))),
    ]
    for stage, step in steps if with_export else steps[:1]:
        try:
            step()
        except Exception as error:  # whatever an architecture's code raises is the result
            failed = "after an update" if stage == "engine" and "engine" in found else stage
            found[failed] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            if failed == "engine":
                break
    return found


def in_a_process(name: str, *, with_export: bool = True) -> dict[str, float | str]:
    """Return what `measure` finds, in a process that can crash or hang."""
    command = [sys.executable, "-m", "benchmarks.model_engines", "--one", name]
    command += [] if with_export else ["--without-export"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, env=os.environ | ENV)
    except subprocess.TimeoutExpired:
        return {"engine": f"not ready after {DEADLINE_S} s"}
    for line in reversed(done.stdout.splitlines()):
        if line.startswith('{"stages"'):
            stages: dict[str, float | str] = json.loads(line)["stages"]
            return stages
    return {"engine": (done.stderr.strip().splitlines() or ["no output"])[-1][:200]}


def cell(value: float | str | None) -> str:
    """Return a value as it stands in the table."""
    if value is None:
        return "–"
    return "no" if isinstance(value, str) else f"{value:.1e}"


def main() -> int:
    """Print a table, and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--results", type=Path, default=Path("build/model_engines.jsonl"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--without-export", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        with tempfile.TemporaryDirectory() as folder:
            stages = measure(arguments.one, Path(folder), with_export=not arguments.without_export)
            print(json.dumps({"stages": stages}), flush=True)
        return 0
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    lines = arguments.results.read_text().splitlines() if arguments.results.exists() else []
    known = dict(json.loads(line) for line in lines)
    print(f"| architecture | {' | '.join(STAGES)} |\n|{'---|' * (len(STAGES) + 1)}")
    counts = dict.fromkeys(["agree", "refused by the engine", "differ"], 0)
    for name in arguments.names or ARCHITECTURES:
        if name not in known:
            known[name] = in_a_process(name)
            with arguments.results.open("a") as file:
                file.write(json.dumps([name, known[name]]) + "\n")
        found = known[name]
        print(f"| {name} | {' | '.join(cell(found.get(stage)) for stage in STAGES)} |", flush=True)
        values = [found.get(stage) for stage in STAGES]
        if isinstance(values[0], str):
            counts["refused by the engine"] += 1
        else:
            agree = all(isinstance(value, float) and value < MAX_NATS for value in values)
            counts["agree" if agree else "differ"] += 1
    print(json.dumps(counts))
    return 0 if counts["agree"] >= min(_WANTED, len(arguments.names or ARCHITECTURES)) else 1


if __name__ == "__main__":
    sys.exit(main())
