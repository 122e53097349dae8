"""The checks before a run, in a process of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from quatro_ray.errors import ClusterError, SeveralErrors
from quatro_ray.jobs import prepared
from quatro_ray.jobs.preflight import check
from quatro_ray.jobs.prepared import prepare
from tests.make import config


def test_it_returns_what_the_checks_return(tmp_path: Path) -> None:
    wanted = config(tmp_path / "run")
    assert prepare(wanted) == check(wanted)


def test_all_problems_come_across(tmp_path: Path) -> None:
    wanted = config(
        tmp_path / "run",
        data={
            "train": {"mine": {"kind": "jsonl", "path": "/nowhere.jsonl"}},
            "eval": {"sums": {"kind": "chain_sum", "num_questions": 16, "seed": 1}},
        },
        cluster={"cpus_per_rank": 999, "cpus_per_engine": 0.5, "cpus_per_verifier": 0.05},
    )
    with pytest.raises(SeveralErrors) as here:
        check(wanted)
    with pytest.raises(SeveralErrors) as there:
        prepare(wanted)
    assert str(there.value) == str(here.value)
    assert [str(e) for e in there.value.errors] == [str(e) for e in here.value.errors]


def test_a_process_that_ends_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "_PROGRAM", "quatro_ray.no_such_module")
    with pytest.raises(ClusterError, match="checks before the start ended with status 1 and without a result"):
        prepare(config(tmp_path / "run"))
    monkeypatch.undo()
    monkeypatch.setattr(prepared, "_DEADLINE_S", 0.0)
    with pytest.raises(ClusterError, match=r"status -9 .*for lack of memory or after 0 s"):
        prepare(config(tmp_path / "run"))


def test_the_controller_does_without_torch() -> None:
    """It would hold 200 MB of libraries that it never calls."""
    program = (
        "import sys, quatro_ray.jobs.train; print([m for m in ('torch', 'transformers', 'vllm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "[]\n"
