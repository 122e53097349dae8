"""The arguments of engines: those of an engine on CPU, and a check of `generator.engine_args` by vLLM's own parser.

The check has a process of its own, because importing vLLM takes long.
"""

from __future__ import annotations

import argparse
import difflib
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, NoReturn

from quatro_ray.config import Config, GeneratorConfig
from quatro_ray.config.generator import CPU_KV_CACHE_GIB
from quatro_ray.errors import ConfigError

if TYPE_CHECKING:
    from vllm.engine.arg_utils import AsyncEngineArgs

_DEADLINE_S = 180.0
_GPU_BATCHED_TOKENS = 8192
"""vLLM's default for engines that are not servers is a quarter of it, at which prompts fill no GPU."""


def cpu_args(kv_cache_gib: float | None, num_workers: int = 1) -> dict[str, object]:
    """Return the arguments of an engine that has no accelerator.

    The worker of a single device runs in the engine's own process. For `uni`, vLLM would take `mp`, because it could
    not bind threads otherwise; threads are bound by the environment here (orchestrator/placement.py). Its own worker
    process costs 10 CPU-seconds more at the start, and both processes spin while they wait for each other.

    Args:
        kv_cache_gib: memory for keys and values, GiB; CPU_KV_CACHE_GIB if None.
        num_workers: workers of the engine, or of each of its data-parallel copies.
    """
    size = int((kv_cache_gib or CPU_KV_CACHE_GIB) * 2**30)
    args: dict[str, object] = {"kv_cache_memory_bytes": size, "enforce_eager": True}
    if num_workers == 1:
        args["distributed_executor_backend"] = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
    return args


def gpu_args(config: GeneratorConfig) -> dict[str, object]:
    """Return the arguments of an engine on GPUs."""
    args: dict[str, object] = {
        "max_num_batched_tokens": config.max_num_batched_tokens or _GPU_BATCHED_TOKENS,
        # with a size of the cache too, because vLLM refuses to start if this share of the memory is not free
        "gpu_memory_utilization": config.gpu_memory_utilization,
    }
    if config.kv_cache_gib is None:
        return args
    return args | {"kv_cache_memory_bytes": int(config.kv_cache_gib * 2**30)}


def check_engine_args(config: Config) -> None:
    """Raise ConfigError if vLLM has no argument of a name in `generator.engine_args`, or refuses its value."""
    if not (given := config.generator.engine_args):
        return
    command = [sys.executable, "-m", "quatro_ray.engines.engine_args"]
    try:
        done = subprocess.run(
            command, input=json.dumps(given, default=str), capture_output=True, text=True, timeout=_DEADLINE_S
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"generator.engine_args: vLLM did not check them within {_DEADLINE_S:g} s; free the machine and try again"
        ) from error
    lines = done.stdout.splitlines()
    if done.returncode or not lines:  # vLLM may print before it; the last line is ours
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ConfigError(f"generator.engine_args: vLLM's parser cannot be loaded ({reason}); repair its installation")
    if problems := json.loads(lines[-1]):
        raise ConfigError("; ".join(problems))


def problems_of(given: Mapping[str, object]) -> list[str]:
    """Return one text for each argument that vLLM does not have or whose value it refuses: field, rule, remedy."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    names = [field.name for field in fields(AsyncEngineArgs)]
    problems = []
    for name, value in given.items():
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            remedy = f"did you mean {close[0]}?" if close else "remove it, or correct its spelling"
            problems.append(f"generator.engine_args.{name}: vLLM's AsyncEngineArgs has no such field; {remedy}")
        elif reason := _refused(AsyncEngineArgs, name, value):
            problems.append(f"generator.engine_args.{name}={value!r}: vLLM refuses it ({reason}); change it")
    return problems


def _refused(engine_args: type[AsyncEngineArgs], name: str, value: object) -> str | None:
    """Return why vLLM's parser refuses a value, or None if it takes it or has no such option."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ValueError(message)

    parser = engine_args.add_cli_args(Parser(add_help=False))
    action = next((action for action in parser._actions if action.dest == name), None)
    if action is None or value is None:
        return None
    try:
        parser.parse_args(_argv(action, value))
    except ValueError as error:
        lines = [line.strip() for line in str(error).splitlines() if "For further information" not in line]
        return " ".join(lines).partition(": ")[2][:300] or str(error)
    return None


def _argv(action: argparse.Action, value: object) -> list[str]:
    """Return a value as it would stand on vLLM's command line. Raises ValueError if a flag is not true or false."""
    option = next(text for text in action.option_strings if text.startswith("--"))
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            raise ValueError(f"{option}: must be true or false")
        if value:
            return [option]
        off = [text for text in action.option_strings if text.startswith("--no-")]
        return off[:1]
    if isinstance(value, list) and action.nargs is not None:
        return [option, *map(str, value)]
    return [f"{option}={value if isinstance(value, str) else json.dumps(value)}"]


if __name__ == "__main__":
    print(json.dumps(problems_of(json.load(sys.stdin))))
