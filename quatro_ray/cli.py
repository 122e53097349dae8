"""quatro-ray: train, validate, plan, report."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from quatro_ray.config import Config, dump_config, load_config
from quatro_ray.errors import ConfigError, QuatroError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)

ConfigPath = Annotated[Path, typer.Argument(help="YAML file; configs/ has examples.", metavar="CONFIG.yaml")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.field=value …", metavar="[SECTION.FIELD=VALUE]…")]


@app.command()
def train(config: ConfigPath, overrides: Overrides = None) -> None:
    """Train, then print where the report is."""
    loaded = _checked(config, overrides)
    from quatro_ray.training import train as run

    report = run(loaded)
    print(f"report: {report}")


@app.command()
def validate(config: ConfigPath, overrides: Overrides = None) -> None:
    """Check a configuration and its data files, and print it as resolved. Starts nothing."""
    print(dump_config(_checked(config, overrides)), end="")


@app.command()
def plan(config: ConfigPath, overrides: Overrides = None) -> None:
    """Print actors, resources, batch arithmetic and a memory estimate. Starts nothing."""
    from quatro_ray.plan import describe

    print(describe(load_config(config, overrides)))


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(help="Directory of a finished run.")]) -> None:
    """Write report.html again from the files of a run."""
    from quatro_ray.telemetry.report import write_report

    if not (run_dir / "summary.json").is_file():
        raise ConfigError(f"{run_dir}: has no summary.json; give the directory of a finished run")
    print(f"report: {write_report(run_dir)}")


def _checked(path: Path, overrides: list[str] | None) -> Config:
    """Also reads the data, so that a bad row is found before anything starts."""
    from quatro_ray.tasks.registry import make_dataset

    config = load_config(path, overrides)
    dataset = make_dataset(config.task, config.run.seed)
    if config.evaluation.num_queries > len(dataset.held_out):
        raise ConfigError(
            f"evaluation.num_queries={config.evaluation.num_queries}: there are only {len(dataset.held_out)} "
            "held-out questions; lower it or provide more"
        )
    return config


def main() -> None:
    """Prints errors that a user can cause in one line, and exits with 2."""
    try:
        app()
    except QuatroError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
