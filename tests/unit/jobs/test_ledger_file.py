"""A ledger that is missing, damaged or too old is replaced by its copy in a checkpoint, or the run is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from quatro_ray.config import Config
from quatro_ray.engines.checkpoint_store import LEDGER, CheckpointStore, digest_files
from quatro_ray.errors import ConfigError
from quatro_ray.jobs.run_directory import check_run_dir, claim_run_dir
from quatro_ray.replay.ledger import Ledger
from quatro_ray.types import Query
from tests.make import config


def run(path: Path) -> Config:
    return config(path, run={"dir": str(path), "num_steps": 30, "resume": "auto"})


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A run with checkpoints of two steps, and groups admitted since the last one."""
    path = tmp_path / "run"
    with claim_run_dir(run(path)):
        pass
    ledger = Ledger(path / LEDGER)
    store = CheckpointStore(path / "checkpoints", keep=2)
    for step in (1, 2):
        with ledger.transaction():
            ledger.versions.add_step(step - 1)
        ledger.admit(ledger.next_id(), [Query(str(n), "1+1=", "2") for n in range(4)], step)
        writing = store.begin(step)
        (writing / "weights").write_text("weights")
        ledger.snapshot(writing / LEDGER)
        store.commit(writing, step, {}, digest_files(writing))
    ledger.admit(ledger.next_id(), [Query(str(n), "1+1=", "2") for n in range(4)], 2)
    ledger.close()
    (path / "metrics.jsonl").write_text('{"step": 1}\n')
    return path


def delete(ledger: Path) -> None:
    ledger.unlink()


def empty(ledger: Path) -> None:
    ledger.write_bytes(b"")


def cut(ledger: Path) -> None:
    ledger.write_bytes(ledger.read_bytes()[:1500])


def flip(ledger: Path) -> None:
    data = bytearray(ledger.read_bytes())
    data[data.index(b"pending")] ^= 1
    ledger.write_bytes(data)


def put_an_old_one(ledger: Path) -> None:
    shutil.copy(ledger.parent / "checkpoints" / "step_1" / LEDGER, ledger)


DAMAGES: list[Any] = [
    (delete, "is missing"),
    (empty, "is damaged: it is empty"),
    (cut, "is damaged: "),
    (flip, "is damaged: "),
    (put_an_old_one, r"is older than the checkpoint step_2 \(its newest version is 1, not 2\)"),
]


@pytest.mark.parametrize(("damage", "why"), DAMAGES)
def test_the_copy_in_the_newest_checkpoint_takes_its_place(begun: Path, damage: Any, why: str) -> None:
    damage(begun / LEDGER)
    check_run_dir(run(begun))  # changes nothing
    with claim_run_dir(run(begun)) as claim:
        assert claim.resumes
    line = claim.restored
    assert line is not None
    assert f"{begun / LEDGER} {why.split(' (')[0]}".replace("\\", "") in line
    assert line.endswith("; its copy in the checkpoint step_2 has taken its place")
    ledger = Ledger(begun / LEDGER)
    assert (ledger.next_id(), ledger.versions.newest()) == (9, 2)
    ledger.close()
    assert (begun / "ledger.sqlite.damaged").exists() == (damage is not delete)
    with claim_run_dir(run(begun)) as claim:
        assert claim.resumes and claim.restored is None


def test_a_damaged_copy_is_not_used(begun: Path) -> None:
    delete(begun / LEDGER)
    flip(begun / "checkpoints" / "step_2" / LEDGER)
    with claim_run_dir(run(begun)) as claim:
        assert claim.restored is not None and "step_1 has taken its place" in claim.restored


@pytest.mark.parametrize(("damage", "why"), DAMAGES[:4])
def test_without_a_copy_the_run_is_refused_with_the_remedy(begun: Path, damage: Any, why: str) -> None:
    damage(begun / LEDGER)
    shutil.rmtree(begun / "checkpoints")
    for use in (check_run_dir, lambda made: claim_run_dir(made).__enter__()):
        with pytest.raises(ConfigError, match=rf"cannot be continued: .*{why}.* restore ledger.sqlite from a backup"):
            use(run(begun))


def test_what_never_trained_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "run"
    for _ in range(2):
        with claim_run_dir(run(path)) as claim:
            assert not claim.resumes
        (path / "metrics.jsonl").touch()
