"""The training job: check the configuration, start the cluster, train, and write summary and report."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import ray
from ray.exceptions import RayError

from quatro_ray.actors.calls import value_of
from quatro_ray.actors.memory import collect_rarely, own_peak_rss_bytes
from quatro_ray.actors.node import while_node_lives
from quatro_ray.config import Config, TinyModelConfig
from quatro_ray.data.dataset import Dataset, QueryStream
from quatro_ray.data.registry import describe
from quatro_ray.engines.checkpoint_store import replace_folder
from quatro_ray.errors import ClusterError, Preempted, TakenOver, last_line
from quatro_ray.files import replace_file
from quatro_ray.jobs.prepared import Prepared, prepare
from quatro_ray.jobs.run_directory import Claim, claim_run_dir
from quatro_ray.jobs.stop_signals import StopSignals
from quatro_ray.orchestrator.cluster import Cluster, spawn
from quatro_ray.orchestrator.connection import connect
from quatro_ray.orchestrator.controller import Controller
from quatro_ray.orchestrator.placement import Placer
from quatro_ray.orchestrator.prometheus import export_metrics
from quatro_ray.orchestrator.resources import bundles
from quatro_ray.orchestrator.startup import waiting_for
from quatro_ray.replay.buffer import ReplayStats
from quatro_ray.telemetry.console import Progress
from quatro_ray.telemetry.counters import Counters
from quatro_ray.telemetry.now_file import NowFile
from quatro_ray.telemetry.recorder import Recorder
from quatro_ray.telemetry.report import write_report
from quatro_ray.telemetry.tracker import Outcome
from quatro_ray.timeouts import Overtaken, unless, within
from quatro_ray.trackers.processes import TrackerProcesses
from quatro_ray.types import Query


def train(config: Config, *, verbose: bool = False) -> Path:
    """Run the whole training job.

    Args:
        config: the resolved configuration.
        verbose: show the output of all actors, and no progress line that is updated in place.

    Returns:
        The path of the report.

    Raises:
        QuatroError: an error that the user can cause, with a message of one line.
    """
    with StopSignals() as signals:
        with waiting_for("the checks of data and model", Progress().say):
            prepared = prepare(config)
        with claim_run_dir(config, prepared.inputs, Progress().say) as claim:
            return _train(config, prepared, claim, signals, verbose=verbose)


def _train(config: Config, prepared: Prepared, claim: Claim, signals: StopSignals, *, verbose: bool) -> Path:
    dataset = prepared.dataset
    run_dir = config.run.dir
    progress = Progress(in_place=not verbose)
    recorder = Recorder(run_dir, num_steps=config.run.num_steps, progress=progress)
    recorder.follow_with(TrackerProcesses(config, recorder))
    if claim.restored is not None:
        recorder.event("restored", "ledger", why=claim.restored)
        recorder.say(claim.restored)
    now_file = NowFile(run_dir, recorder.roles, recorder.note)
    outcome: Outcome = "finished"
    try:
        with recorder.phase("controller", "connect"), waiting_for("Ray", recorder.say):
            connect(config, show_actor_logs=verbose)
        signals.take()  # Ray has set its own handler
        if config.telemetry.prometheus:
            export = export_metrics(config, recorder.note)
            recorder.follow_with(export)
            recorder.listen(export.on_event)
        for line in [*describe(dataset), *prepared.notes]:
            recorder.say(line)
        collect_rarely()
        counters, stats, memory = asyncio.run(
            claim.token.while_newest(_run(config, dataset, recorder, signals, resume=claim.resumes))
        )
    except TakenOver:
        outcome = "stopped"
        raise  # the notes are the newer attempt's now
    except BaseException as error:
        recorder.note(f"ended by {type(error).__name__}: {error}")
        outcome = "stopped" if isinstance(error, Preempted) else "failed"
        if isinstance(error, RayError):
            raise ClusterError(
                f"an actor failed: {last_line(error)}; see {run_dir}/notes.log for the whole traceback"
            ) from error
        raise
    finally:
        seconds, shares = recorder.seconds(), recorder.time_shares()
        now_file.close()
        recorder.close(outcome)
        ray.shutdown()
    summary = summarise(counters, stats, memory | {"controller": own_peak_rss_bytes()}, seconds, shares)
    replace_file(run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
    return write_report(run_dir)


async def make_model(place: Placer, dataset: Dataset, say: Callable[[str], None]) -> str:
    """Return the path of the starting policy. A tiny model is created and warmed up first, in a learner's place."""
    config = place.config
    if not isinstance(config.model, TinyModelConfig):
        return config.model.path
    path = config.run.dir / "model"
    if path.is_dir():  # made before this run was resumed; the folder gets this name only when it is complete
        return str(path)
    say("making a tiny model and warming it up by supervised training")
    writing = path.with_name("model.writing")
    lines = place(_warm_up, "learner", 0).remote(config, *dataset.warmup, writing)
    while (line := await within(config.cluster.stall_deadline_s, anext(lines, None))) is not None:
        say(await value_of(line))
    replace_folder(writing, path)
    return str(path)


@ray.remote(num_returns="streaming")
def _warm_up(config: Config, train: Sequence[Query], held_out: Sequence[Query], path: Path) -> Iterator[str]:
    """Create and warm up a tiny model; yields lines about its progress."""
    from quatro_ray.engines.tiny_warmup import warm_up

    assert isinstance(config.model, TinyModelConfig)
    yield from warm_up(config.model, train, held_out, config.run.seed, path)


async def _run(
    config: Config, dataset: Dataset, recorder: Recorder, signals: StopSignals, *, resume: bool
) -> tuple[Counters, ReplayStats, dict[str, int]]:
    """Start the cluster and train; return the counters, the ledger's numbers and the peak memory by role in bytes."""
    with signals.in_the_loop():
        cluster = await _start(config, dataset, recorder, signals)
        try:
            components = cluster.components()
            queries = QueryStream(dataset, config.run.seed, shuffle=config.data.shuffle)
            controller = Controller(config, components, queries, dataset.held_out, recorder)
            signals.call(controller.stop)
            counters = await while_node_lives(controller.run(resume=resume))
            return counters, await components.replay.stats(), cluster.peak_rss_bytes()
        finally:
            cluster.shutdown()


async def _start(config: Config, dataset: Dataset, recorder: Recorder, signals: StopSignals) -> Cluster:
    told_to_stop = asyncio.Event()
    signals.call(told_to_stop.set)
    try:
        return await unless(told_to_stop, _place_and_start(config, dataset, recorder))
    except Overtaken:
        signals.end_the_start()


async def _place_and_start(config: Config, dataset: Dataset, recorder: Recorder) -> Cluster:
    with recorder.phase("controller", "place"):
        place = await Placer.reserve(config, bundles(config), recorder.say)
    try:
        with recorder.phase("controller", "model"):
            model_path = await make_model(place, dataset, recorder.say)
        recorder.say("starting engines and learner")
        with recorder.phase("controller", "start"), recorder.phase("learner", "start"):
            return await spawn(place, model_path, recorder.say)
    except BaseException:
        place.release()
        raise


def summarise(
    counters: Counters,
    ledger: ReplayStats,
    memory: dict[str, int],
    seconds: dict[str, float],
    time_shares: dict[str, dict[str, float]],
) -> dict[str, object]:
    """Return the content of summary.json; docs/run_directory.md explains the fields.

    Args:
        counters: what the controller counted.
        ledger: what the ledger counted.
        memory: peak resident memory by role, in bytes.
        seconds: duration by phase.
        time_shares: share of each state in the time of each role.
    """
    first = counters.evaluations[0].name
    of_first = [e for e in counters.evaluations if e.name == first]
    start, end = of_first[0], of_first[-1]
    steps = counters.steps
    return {
        **{f"pass_at_{k}_start": v for k, v in start.pass_at.items()},
        **{f"pass_at_{k}_end": v for k, v in end.pass_at.items()},
        "evaluations": {e.name: e.record() for e in counters.evaluations},  # the last of each set
        "learner_steps": steps.learner_steps,
        "skipped_steps": steps.skipped_steps,
        "uninformative_steps": steps.uninformative_steps,
        "weight_updates": steps.weight_updates,
        "in_flight_updates": steps.in_flight_updates,
        "multi_version_rollouts": counters.multi_version_rollouts,
        "staleness_tokens": {str(k): v for k, v in sorted(steps.staleness_tokens.items())},
        "groups_admitted": ledger.num_admitted,
        "groups": ledger.groups,
        "drops": ledger.drops,
        "verifier_outcomes": dict(counters.outcomes),
        "generated_tokens": counters.generated_tokens,
        "trained_tokens": steps.trained_tokens,
        "evaluation_tokens": sum(e.num_tokens for e in counters.evaluations),
        "seconds": {k: round(v, 2) for k, v in seconds.items()},
        "time_share": {role: {k: round(v, 4) for k, v in found.items()} for role, found in time_shares.items()},
        "recovery": {name.removeprefix("health/"): int(n) for name, n in counters.health().items()}
        | {"buffer_restarts": ledger.num_opened - 1 - counters.resumed},
        "peak_rss_bytes": memory,
    }
