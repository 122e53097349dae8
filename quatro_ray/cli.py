"""Asynchronous RL for language models with an exact trust region per query."""

from __future__ import annotations

import errno
import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from quatro_ray.config import Config, dump_config, load_config
from quatro_ray.config.paths import paths_of_this_process
from quatro_ray.errors import ConfigError, Preempted, QuatroError
from quatro_ray.telemetry.logs import log_to_stderr

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

ConfigPath = Annotated[
    Path, typer.Argument(help="Path of a YAML file, or demo for the packaged demo.", metavar="CONFIG.yaml")
]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.field=value …", metavar="[SECTION.FIELD=VALUE]…")]
RunDir = Annotated[Path, typer.Argument(help="Directory of a run: finished, running or crashed.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Log notes, events and the output of all actors to the terminal.")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"quatro-ray {version('quatro_ray')}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def _load(config: Path, overrides: list[str] | None) -> Config:
    paths = paths_of_this_process()
    loaded = load_config(config, overrides, paths)
    for line in paths.notes():
        print(f"# {line}", flush=True)
    return loaded


@app.command()
def train(config: ConfigPath, overrides: Overrides = None, verbose: Verbose = False) -> None:
    """Train, then print the path of the report."""
    if verbose:
        log_to_stderr()
    loaded = _load(config, overrides)
    from quatro_ray.jobs.train import train as run

    print(f"report: {run(loaded, verbose=verbose)}")


@app.command()
def submit(
    config: ConfigPath,
    overrides: Overrides = None,
    address: Annotated[
        str | None,
        typer.Option(help="URL of the cluster's dashboard; default: RAY_ADDRESS, else http://127.0.0.1:8265."),
    ] = None,
    include: Annotated[
        list[Path] | None, typer.Option(help="A file or folder that travels too, such as a module; may be repeated.")
    ] = None,
    env: Annotated[
        list[str] | None, typer.Option(help="Name of a variable that the job gets from here; may be repeated.")
    ] = None,
    wait: Annotated[bool, typer.Option(help="Show the job's output until it ends; Ctrl-C stops the job.")] = True,
) -> None:
    """Train as a job on a Ray cluster. Files with relative paths travel there; absolute paths are the cluster's.

    The exit status is that of the run: 143 if it was stopped.
    """
    from quatro_ray.jobs.submit import submit as run

    say = partial(print, flush=True)
    status = run(config, overrides or [], address, say, include=include or [], variables=env or [], wait=wait)
    raise typer.Exit(status)


@app.command(name="eval")
def evaluate(
    config: ConfigPath,
    overrides: Overrides = None,
    model: Annotated[str | None, typer.Option(help="Folder or hub name; default: the export in run.dir.")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="A checkpoint of run.dir by its tag, as step_100.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where results go; default: evaluation/ in run.dir.")] = None,
    verbose: Verbose = False,
) -> None:
    """Evaluate a model on every set of data.eval; needs no learner."""
    if verbose:
        log_to_stderr()
    loaded = _load(config, overrides)
    from quatro_ray.jobs.evaluate import evaluate_model

    folder = out or loaded.run.dir / "evaluation"
    for result in evaluate_model(loaded, model, checkpoint, folder, verbose=verbose):
        print(result.line())
    print(f"written: {folder}")


@app.command()
def validate(config: ConfigPath, overrides: Overrides = None) -> None:
    """Check all that `train` checks before it starts, and print the configuration as resolved. Starts nothing."""
    loaded = _load(config, overrides)
    from quatro_ray.data.registry import describe
    from quatro_ray.jobs.preflight import check

    prepared = check(loaded)
    for line in [*describe(prepared.dataset), *prepared.notes]:
        print(f"# {line}")
    print(dump_config(loaded), end="")


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    simulate: Annotated[
        Path | None,
        typer.Option(metavar="RUN_DIR", help="A short run; also advise how to split the devices, from its figures."),
    ] = None,
) -> None:
    """Print actors, resources, batch arithmetic and a memory estimate. Starts nothing."""
    from quatro_ray.orchestrator.device_memory import describe_device_memory
    from quatro_ray.orchestrator.resources import describe

    loaded = _load(config, overrides)
    print(describe(loaded), flush=True)
    for line in describe_device_memory(loaded):
        print(f"  {line}", flush=True)
    if simulate is not None:
        from quatro_ray.simulation.advice import advise

        for line in advise(loaded, simulate):
            print(line, flush=True)


@app.command()
def fields(section: Annotated[str | None, typer.Argument(help="Only this section.")] = None) -> None:
    """List every field of the configuration with type, default and meaning."""
    from quatro_ray.config.field_reference import describe_fields

    try:
        print(describe_fields(section))
    except KeyError as error:
        raise ConfigError(f"{error.args[0]}: no such section; `quatro-ray fields` lists all") from error


@app.command()
def tasks() -> None:
    """List the tasks of reasoning-gym, for sources of kind reasoning_gym."""
    from reasoning_gym.factory import DATASETS

    print("\n".join(sorted(DATASETS)))


@contextmanager
def _usable(run_dir: Path) -> Iterator[None]:
    """Raise ConfigError for a file of a run that this user may not read or write."""
    try:
        yield
    except PermissionError as error:
        what = f"{error.filename or run_dir}: permission denied"
        raise ConfigError(f"{what}; the files of a run are for its owner: use that account, or allow yours") from error
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.ENOSPC, errno.ESTALE, errno.EIO):
            raise
        raise ConfigError(f"{error.filename or run_dir}: {error.strerror}; check the disk or the mount") from error


@app.command()
def status(
    run_dir: RunDir,
    as_json: AsJson = False,
    watch: Annotated[bool, typer.Option(help="Show it again until the run has ended, or Ctrl-C.")] = False,
    every: Annotated[float, typer.Option(help="With --watch: seconds between two looks at the run.", min=1)] = 5.0,
) -> None:
    """Show what a run does now, how fast it is and when it will end, from its files alone."""
    from quatro_ray.jobs.status_view import show_status

    with suppress(KeyboardInterrupt), _usable(run_dir):
        show_status(run_dir, as_json=as_json, every_s=every if watch else None)


@app.command()
def audit(
    run_dir: RunDir,
    as_json: AsJson = False,
    deep: Annotated[bool, typer.Option(help="Also compare the checksums of checkpoints and stored rollouts.")] = False,
) -> None:
    """Check that every group, step and version of a run is there once. Exit status 1 if anything is lost or doubled."""
    from quatro_ray.jobs.audit import audit_run
    from quatro_ray.jobs.audit_view import view
    from quatro_ray.telemetry.run_files import finite

    with _usable(run_dir):
        found = audit_run(run_dir, thorough=deep)
    print(json.dumps(finite(found.record())) if as_json else view(found))
    raise typer.Exit(1 if found.findings else 0)


@app.command()
def report(
    run_dir: RunDir,
    watch: Annotated[
        bool, typer.Option(help="Write it again after every change, until the run is finished or Ctrl-C.")
    ] = False,
    every: Annotated[float, typer.Option(help="With --watch: seconds between two looks at the run.", min=1)] = 10.0,
) -> None:
    """Write report.html from the files of a run, whether it is finished or not."""
    from quatro_ray.telemetry.report import watch_report, write_report

    with _usable(run_dir):
        path = write_report(run_dir, refresh_s=every if watch else None)
        print(f"report: {path}", flush=True)
        if watch:
            with suppress(KeyboardInterrupt):
                watch_report(run_dir, every)


@app.command()
def trace(
    run_dir: RunDir,
    out: Annotated[Path | None, typer.Option(help="Where to write it; by default RUN_DIR/trace.json.")] = None,
) -> None:
    """Write what each part of a run did and when as a Chrome trace, for ui.perfetto.dev."""
    from quatro_ray.telemetry.chrome_trace import write_trace

    unreadable = Counter[str]()
    with _usable(run_dir):
        path = write_trace(run_dir, unreadable, out)
    for name, num in unreadable.items():
        print(f"{num:,} lines of {name} cannot be read and are left out", file=sys.stderr)
    print(f"trace: {path}")


@app.command(context_settings={"ignore_unknown_options": True})  # a negative step is told the rule of steps
def replay(
    run_dir: Annotated[Path, typer.Argument(help="Directory of a run: finished, running or crashed.")],
    step: Annotated[int, typer.Argument(help="Optimiser step, from 1 on.")],
    overrides: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for metrics, rollouts and an export of the weights after the step.")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Make a learner step again without engines, and compare its metrics with those of the run, bit for bit.

    The exit status is 1 if one differs.
    """
    from quatro_ray.jobs.replay_step import replay_step

    found = replay_step(run_dir, step, partial(print, flush=True), overrides=overrides or [], out=out, verbose=verbose)
    for name, (recorded, now) in found.items():
        print(f"{name}: {recorded} in the run, {now} now")
    if found:
        raise typer.Exit(1)
    print("the same bit for bit")


def main() -> None:
    """Run the command line. An error that a user can cause is one line and exit status 2; signal n gives 128 + n."""
    try:
        app()
    except Preempted as error:
        print(f"ended: {error}", file=sys.stderr)
        sys.exit(128 + error.number)
    except QuatroError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
