"""The evaluation job, `quatro-ray eval`: a model on every held-out set of a configuration, without a learner."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import ray
from ray.exceptions import RayError

from quatro_ray.config import Config, TinyModelConfig, dump_config
from quatro_ray.config.paths import folder_or_name, paths_of_this_process
from quatro_ray.data.registry import describe
from quatro_ray.errors import ClusterError, ConfigError, last_line
from quatro_ray.files import replace_file
from quatro_ray.jobs.preflight import check_evaluation
from quatro_ray.orchestrator.cluster import spawn_evaluation
from quatro_ray.orchestrator.connection import connect
from quatro_ray.orchestrator.startup import waiting_for
from quatro_ray.telemetry.console import Progress
from quatro_ray.telemetry.evaluation_result import EvaluationResult
from quatro_ray.types import Query

_logger = logging.getLogger(__name__)

FILES = ("config.yaml", "model", "evaluations.jsonl", "evaluation_rollouts.jsonl", "notes.log")


def evaluate_model(
    config: Config, model: str | None, checkpoint: str | None, out: Path, *, verbose: bool = False
) -> list[EvaluationResult]:
    """Evaluate the model that `find_model` returns, and write `FILES`.

    Args:
        config: its held-out sets, rewards, engines and sampling are used.
        model: see `find_model`.
        checkpoint: see `find_model`; it is converted into a folder in `out`.
        out: folder of the results; an earlier evaluation in it is replaced.
        verbose: show the output of all actors.

    Returns:
        One result for each held-out set.

    Raises:
        QuatroError: an error that the user can cause, with a message of one line.
    """
    model_path = find_model(config, model, checkpoint)
    dataset = check_evaluation(config, model_path)
    _make_folder(out)
    if checkpoint is not None:
        model_path = _convert(config, checkpoint, out)
    progress = Progress()
    replace_file(out / "config.yaml", dump_config(config))
    for line in describe(dataset):
        if line.startswith("data.eval."):
            progress.say(line)
    with (out / "notes.log").open("w", encoding="utf-8") as notes:

        def say(line: str) -> None:
            progress.say(line)
            note(line)

        def note(line: str) -> None:
            notes.write(line + "\n")
            notes.flush()
            _logger.info("%s", line)

        try:
            with waiting_for("Ray", say):
                connect(config, show_actor_logs=verbose)
            results = asyncio.run(_evaluate(config, model_path, dataset.held_out, note, say))
        except RayError as error:
            raise ClusterError(f"an actor failed: {last_line(error)}") from error
        finally:
            ray.shutdown()
    _write(out / "evaluations.jsonl", [{"model": model_path, **result.record()} for result in results])
    read = [{"set": result.name, **group} for result in results for group in result.rollouts]
    _write(out / "evaluation_rollouts.jsonl", read)
    return results


async def _evaluate(
    config: Config,
    model_path: str,
    held_out: Mapping[str, Sequence[Query]],
    note: Callable[[str], None],
    say: Callable[[str], None],
) -> list[EvaluationResult]:
    cluster = await spawn_evaluation(config, model_path, say)
    try:
        return await cluster.evaluator.evaluate(model_path, 0, 0, held_out, note)
    finally:
        cluster.shutdown()


def find_model(config: Config, model: str | None, checkpoint: str | None) -> str:
    """Return the path of the model to evaluate; of a checkpoint, which has weights alone, that of the starting policy.

    Args:
        config: `run.dir` and the checkpoint folder are used.
        model: a folder or the name of a model on the hub. If neither this nor `checkpoint` is given, the run's export.
        checkpoint: the tag of one of the run's checkpoints, such as `step_100`.

    Raises:
        ConfigError: both `model` and `checkpoint` are given, or the model does not exist.
    """
    if model is not None and checkpoint is not None:
        raise ConfigError("--model and --checkpoint: give only one of them")
    if model is not None:
        return _named_model(model)
    if checkpoint is not None:
        return _source_of(config, checkpoint)
    export = config.run.dir / "export"
    if not export.is_dir():
        raise ConfigError(f"{export}: the run has no export yet; give --model or --checkpoint")
    return str(export)


def _named_model(model: str) -> str:
    try:
        return folder_or_name(model, paths_of_this_process())
    except ValueError as error:
        raise ConfigError(f"--model={model}: {error}") from error


def _source_of(config: Config, tag: str) -> str:
    """Return the path of the policy that the run with this checkpoint started from."""
    if not (config.checkpoint_dir / tag).is_dir():
        have = sorted(p.name for p in config.checkpoint_dir.glob("*") if p.is_dir())
        raise ConfigError(f"--checkpoint {tag}: {config.checkpoint_dir} has {have or 'no checkpoints'}")
    return str(config.run.dir / "model") if isinstance(config.model, TinyModelConfig) else config.model.path


def _convert(config: Config, tag: str, out: Path) -> str:
    """Convert ZeRO shards to a folder that vLLM loads; tokenizer and configuration files are the starting policy's."""
    from quatro_ray.engines.policy import convert_checkpoint

    path = out / "model"
    convert_checkpoint(config.checkpoint_dir, tag, _source_of(config, tag), path, config.learner.lora)
    return str(path)


def _make_folder(path: Path) -> None:
    """Create the folder of the results. Raises ConfigError if it holds anything except an earlier evaluation."""
    try:
        if path.exists() and (not path.is_dir() or any(p.name not in FILES for p in path.iterdir())):
            raise ConfigError(f"--out {path}: holds files that are not an earlier evaluation; choose another folder")
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {path}: cannot be written ({error.strerror}); choose another folder") from error


def _write(path: Path, records: Sequence[Mapping[str, object]]) -> None:
    replace_file(path, "".join(json.dumps(record) + "\n" for record in records))
