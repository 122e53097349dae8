"""Records that still are JSON but have other types than a run writes: commands leave them out, and say so."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from quatro_ray.errors import ConfigError
from quatro_ray.jobs.audit import audit_run
from quatro_ray.jobs.audit_view import view as view_audit
from quatro_ray.jobs.status import read_status
from quatro_ray.jobs.status_view import view as view_status
from quatro_ray.telemetry.chrome_trace import write_trace
from quatro_ray.telemetry.report import write_report
from quatro_ray.telemetry.run_files import read_run

ODD = ["x", "", [], ["x"], {}, {"x": "y"}, {"²": 1}, None, True, -1, 0.5, 1e300, 2**52, 10**400, float("nan")]
FILES = ("metrics", "events", "evaluations", "timeline", "rollouts")  # of the last, a report reads three lines only
NOW = {"clock_s": 1.0, "host": "h", "roles": {"learner": [[0, "train", 1.0]]}}


def altered(value: Any) -> Iterator[Any]:
    """Yield copies of a JSON value in which one part, at any depth, is odd or missing."""
    yield from ODD
    if isinstance(value, dict):
        for name, inner in value.items():
            yield {k: v for k, v in value.items() if k != name}
            yield from (value | {name: other} for other in altered(inner))
    if isinstance(value, list) and value:
        yield from ([other, *value[1:]] for other in altered(value[0]))


def some(rng: random.Random, values: Iterator[Any]) -> list[Any]:
    found = list(values)
    return rng.sample(found, min(len(found), 100))


def test_every_record_of_a_run_can_be_read(run: Path) -> None:
    assert not read_run(run).unreadable
    assert not read_status(run).unreadable


@pytest.mark.parametrize("seed", [0, 1])
def test_odd_records_are_left_out_and_counted(run: Path, seed: int) -> None:
    rng = random.Random(seed)
    for name in FILES:
        path = run / f"{name}.jsonl"
        kinds = {tuple(json.loads(line)): line for line in path.read_text().splitlines()}
        with path.open("a") as file:
            for line in kinds.values():
                file.writelines(json.dumps(odd) + "\n" for odd in some(rng, altered(json.loads(line))))
    (run / "now.json").write_text(json.dumps(NOW))

    status, audit, unreadable = read_status(run), audit_run(run), Counter[str]()
    assert "lines of timeline.jsonl, which cannot be read" in view_status(status)
    json.dumps(status.record(), allow_nan=False)
    report = write_report(run).read_text()
    assert [name for name in FILES[:-1] if f"lines of {name}.jsonl could not be read" not in report] == []
    write_trace(run, unreadable)
    assert min(unreadable[f"{name}.jsonl"] for name in ("metrics", "events", "timeline")) > len(ODD)
    assert [name for name in FILES if name != "timeline" and f"{name}.jsonl" not in audit.findings] == []
    assert view_audit(audit)


@pytest.mark.parametrize("name", ["summary.json", "now.json", "config.yaml"])
def test_odd_files_beside_the_records_end_no_command(run: Path, name: str) -> None:
    path = run / name
    whole = NOW if name == "now.json" else yaml.safe_load(path.read_text())
    if name == "config.yaml":
        whole = {section: whole[section] for section in ("run", "replay", "checkpoint")}
    for odd in some(random.Random(0), altered(whole)):
        path.write_text(json.dumps(odd))
        with suppress(ConfigError):
            view_status(read_status(run))
        with suppress(ConfigError):
            view_audit(audit_run(run))
        assert isinstance(read_run(run).num_steps, int | None)
