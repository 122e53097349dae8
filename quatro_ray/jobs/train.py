"""The main job from beginning to end: prepare, start, train, write down."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from quatro_ray.actors.memory import own_peak_rss_bytes
from quatro_ray.actors.node import while_node_lives
from quatro_ray.config import Config, TinyModelConfig
from quatro_ray.data.dataset import Dataset, QueryStream
from quatro_ray.data.prompt_lengths import fit_prompts
from quatro_ray.data.registry import describe, make_dataset
from quatro_ray.engines.checkpoint_store import replace_folder
from quatro_ray.engines.pretrained import check_can_be_trained, tokenizer_of
from quatro_ray.environments.registry import check_environments
from quatro_ray.errors import ClusterError, last_line
from quatro_ray.jobs.run_directory import only_writer, prepare_run_dir
from quatro_ray.orchestrator.cluster import Cluster, spawn
from quatro_ray.orchestrator.connection import connect
from quatro_ray.orchestrator.controller import Controller
from quatro_ray.telemetry.console import Progress
from quatro_ray.telemetry.counters import Counters
from quatro_ray.telemetry.recorder import Recorder
from quatro_ray.telemetry.report import write_report


def train(config: Config) -> Path:
    """Runs the whole job; returns the path of the report.

    Raises:
        QuatroError: for everything that a user can cause, with one clear message.
    """
    check_environments(config.environments)
    dataset = fit_prompts(make_dataset(config.data, config.rewards), tokenizer_of(config), config)
    check_can_be_trained(config)
    resume = prepare_run_dir(config)
    with only_writer(config):
        return _train(config, dataset, resume=resume)


def _train(config: Config, dataset: Dataset, *, resume: bool) -> Path:
    run_dir = config.run.dir
    progress = Progress()
    recorder = Recorder(
        run_dir, num_steps=config.run.num_steps, tensorboard=config.telemetry.tensorboard, progress=progress
    )
    try:
        with recorder.phase("controller", "connect"):
            connect(config)
        with recorder.phase("controller", "model"):
            model_path = make_model(config, dataset, recorder)
        for line in describe(dataset):
            recorder.say(line)
        tally, memory = _run(config, dataset, model_path, recorder, resume=resume)
    except BaseException as error:
        recorder.note(f"ended by {type(error).__name__}: {error}")
        if isinstance(error, RayError):
            raise ClusterError(
                f"an actor failed: {last_line(error)}; {run_dir}/notes.log has the whole story"
            ) from error
        raise
    finally:
        recorder.seconds["total"] = recorder.now()
        recorder.close()
        ray.shutdown()
    summary = summarise(tally[0], tally[1], memory | {"controller": own_peak_rss_bytes()}, dict(recorder.seconds))
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return write_report(run_dir)


def make_model(config: Config, dataset: Dataset, recorder: Recorder) -> str:
    """The path of the starting policy; a tiny model is made and warmed up first, in a process of its own."""
    if not isinstance(config.model, TinyModelConfig):
        return config.model.path
    path = config.run.dir / "model"
    if path.is_dir():  # of the part of this run before it was resumed; it is renamed when it is whole
        return str(path)
    recorder.say("making a tiny model and warming it up by supervised training")
    threads = str(os.cpu_count() or 1)
    task = _warm_up.options(runtime_env={"env_vars": {"OMP_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": ""}})
    writing = path.with_name("model.writing")
    for line in task.remote(config, *dataset.warmup, writing):
        recorder.say(ray.get(line, timeout=config.cluster.stall_deadline_s))
    replace_folder(writing, path)
    return str(path)


@ray.remote(num_cpus=1, num_returns="streaming")
def _warm_up(config: Config, train: Any, held_out: Any, path: Path) -> Any:
    """Yields lines of progress."""
    from quatro_ray.engines.tiny_warmup import warm_up

    assert isinstance(config.model, TinyModelConfig)
    yield from warm_up(config.model, train, held_out, config.run.seed, path)


def _run(
    config: Config, dataset: Dataset, model_path: str, recorder: Recorder, *, resume: bool
) -> tuple[tuple[Counters, dict[str, Any]], dict[str, int]]:
    recorder.say("starting engines and learner")
    with recorder.phase("controller", "start"):
        cluster = spawn(config, model_path)
    try:
        result = asyncio.run(_drive(config, dataset, cluster, recorder, resume=resume))
        return result, cluster.peak_rss_bytes()
    finally:
        cluster.shutdown()


async def _drive(
    config: Config, dataset: Dataset, cluster: Cluster, recorder: Recorder, *, resume: bool
) -> tuple[Counters, dict[str, Any]]:
    parts = cluster.parts()
    queries = QueryStream(dataset, config.run.seed, shuffle=config.data.shuffle)
    controller = Controller(config, parts, queries, dataset.held_out, recorder)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, controller.stop)
    tally = await while_node_lives(controller.run(resume=resume))
    return tally, await parts.replay.stats()


def summarise(
    tally: Counters, ledger: dict[str, Any], memory: dict[str, int], seconds: dict[str, float]
) -> dict[str, Any]:
    """The content of summary.json; docs/run_directory.md explains the fields."""
    first = tally.evaluations[0].name
    of_first = [e for e in tally.evaluations if e.name == first]
    start, end = of_first[0], of_first[-1]
    steps = tally.steps
    return {
        **{f"pass_at_{k}_start": v for k, v in start.pass_at.items()},
        **{f"pass_at_{k}_end": v for k, v in end.pass_at.items()},
        "evaluations": {e.name: e.record() for e in tally.evaluations},  # the last of each set
        "learner_steps": steps.learner_steps,
        "skipped_steps": steps.skipped_steps,
        "weight_updates": steps.weight_updates,
        "in_flight_updates": steps.in_flight_updates,
        "multi_version_rollouts": tally.multi_version_rollouts,
        "staleness_tokens": {str(k): v for k, v in sorted(steps.staleness_tokens.items())},
        "groups_admitted": ledger["admitted"],
        "groups": ledger["groups"],
        "drops": ledger["drops"],
        "verifier_outcomes": dict(tally.outcomes),
        "generated_tokens": tally.generated_tokens,
        "trained_tokens": steps.trained_tokens,
        "evaluation_tokens": sum(e.num_tokens for e in tally.evaluations),
        "seconds": {k: round(v, 2) for k, v in seconds.items()},
        "recovery": {name.removeprefix("health/"): int(n) for name, n in tally.health().items()}
        | {"buffer_restarts": ledger["opened"] - 1 - tally.resumed},
        "peak_rss_bytes": memory,
    }
