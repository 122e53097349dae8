"""Which checkpoint and which groups make a step again; tests/real/test_command_line.py makes one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quatro_ray.config import Config, dump_config
from quatro_ray.engines.checkpoint_store import checkpoint_store, digest_files
from quatro_ray.errors import ConfigError
from quatro_ray.jobs.replay_step import (
    _config_of,
    _make_folder,
    _Plan,
    _private_ledger,
    _version_at,
    differences,
    replay_step,
)
from quatro_ray.replay.buffer import ReplayBuffer
from quatro_ray.replay.staleness import Lineage, Stretch
from tests.make import config, group, rollout

B = 2


def made(path: Path, num_steps: int, **replay: Any) -> tuple[Config, ReplayBuffer]:
    """A ledger of a run with so many steps; groups of two steps wait for each step, the later ones first."""
    settings = config(path, replay={"groups_per_step": B, "group_size": 2, "max_staleness": 4, **replay})
    path.mkdir()
    buffer = ReplayBuffer(settings.replay, path / "ledger.sqlite", num_steps=num_steps)
    for version in range(num_steps):
        first = 1 + B * version
        buffer.admit(first, [group(first + i).query for i in range(B)], version)
        for i in reversed(range(B)):
            buffer.ready(group(first + i, rollout(version=version), rollout(version=version, reward=0.0)))
        buffer.lease(version)
        buffer.commit(version)
    return settings, buffer


def checkpoint_at(settings: Config, *steps: int) -> None:
    for step in steps:
        store = checkpoint_store(settings)
        writing = store.begin(step)
        (writing / "weights").write_text("weights")
        store.commit(writing, step, {}, digest_files(writing))


def test_the_batches_since_the_newest_checkpoint_before_the_step(tmp_path: Path) -> None:
    settings, _ = made(tmp_path / "run", 6)
    checkpoint_at(settings, 2, 5)
    with _private_ledger(tmp_path / "run/ledger.sqlite") as ledger:
        plan = _Plan.make(settings, ledger, 4)
        assert (plan.begin, list(plan.versions)) == (2, [3, 4])
        batch = plan.batch(4)
        assert [g.group_id for g in batch.groups] == [7, 8] and batch.lineage == Lineage.unbroken(3)
        assert _Plan.make(settings, ledger, 2).folder is None


def test_a_run_keeps_its_ledger(tmp_path: Path) -> None:
    """Opening it would take it from a run that is in progress."""
    _, buffer = made(tmp_path / "run", 2)
    with _private_ledger(tmp_path / "run/ledger.sqlite"):
        buffer.end_run()  # a change, which a ledger that was taken would refuse
    assert buffer.ledger.times_opened == 1


def test_rollouts_that_are_freed(tmp_path: Path) -> None:
    settings, buffer = made(tmp_path / "run", 6, keep_steps=[3])
    checkpoint_at(settings, 2, 5)
    buffer.absorbed(5)
    with _private_ledger(tmp_path / "run/ledger.sqlite") as ledger:
        assert len(_Plan.make(settings, ledger, 3).batch(3).groups) == B
        assert len(_Plan.make(settings, ledger, 6).batch(6).groups) == B
        with pytest.raises(ConfigError, match=r"STEP=4: .* of step 2, and the rollouts of step 4 are freed"):
            _Plan.make(settings, ledger, 4)
        with pytest.raises(ConfigError, match=r"STEP=7: the run has steps 1 to 6; choose one of them"):
            _Plan.make(settings, ledger, 7)


def test_rollouts_that_are_lost(tmp_path: Path) -> None:
    settings, _ = made(tmp_path / "run", 3)
    for file in (tmp_path / "run/ledger.rollouts").iterdir():
        file.unlink()
    with _private_ledger(tmp_path / "run/ledger.sqlite") as ledger:
        plan = _Plan.make(settings, ledger, 3)
        with pytest.raises(ConfigError, match=r"^STEP=3: needs the rollouts of step 2, and files in ledger.rollouts"):
            plan.batch(2)


@pytest.mark.parametrize("name", ["a#b", "a?b", "a%41", "a: b", "a b", "[a]"])
def test_odd_names_of_the_directory(name: str, tmp_path: Path) -> None:
    settings, buffer = made(tmp_path / name, 2)
    (tmp_path / name / "config.yaml").write_text(dump_config(settings))
    before = sorted(path.name for path in tmp_path.iterdir())
    with _private_ledger(tmp_path / name / "ledger.sqlite") as ledger:
        assert ledger.versions.newest() == buffer.ledger.versions.newest()
    assert _config_of(tmp_path / name, []).run.dir == tmp_path / name
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_place_for_the_results_is_asked_for_first(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^--out=.*/file: cannot be written"):
        _make_folder(tmp_path / "file")


@pytest.mark.parametrize("step", [3, 6])  # from one that is pinned, and from the newest
def test_a_damaged_checkpoint_is_named(tmp_path: Path, step: int) -> None:
    """Numbers that differ would be blamed on the step."""
    settings, _ = made(tmp_path / "run", 6, keep_steps=[3])
    checkpoint_at(settings, 2, 3, 4, 5)
    (settings.checkpoint_dir / f"step_{step - 1}/weights").write_text("weihgts")
    with (
        _private_ledger(tmp_path / "run/ledger.sqlite") as ledger,
        pytest.raises(ConfigError, match=rf"STEP={step}: .*checkpoints/step_{step - 1}, cannot be used: weights does"),
    ):
        _Plan.make(settings, ledger, step)


def test_versions_after_a_fall_back() -> None:
    """Steps 0 to 4 as versions 0 to 4; back to step 2 as version 5, from which steps 3 and 4 were made again."""
    lineage = Lineage((Stretch(0, 2, 0), Stretch(5, 7, 2)))
    assert [_version_at(lineage, step) for step in range(5)] == [0, 1, 5, 6, 7]


def test_only_computed_metrics_are_compared() -> None:
    metrics: dict[str, Any] = {"loss": 0.1, "none": None, "time/train_s": 2.0, "policy/realised_kl_nats": [0.12345678]}
    recorded = {"loss": 0.1, "none": None, "time/train_s": 1.0, "policy/realised_kl_nats": [0.123457], "more": 1}
    assert differences(recorded, metrics) == {}
    assert differences(recorded, metrics | {"loss": 0.1 + 2**-58}) == {}  # the same number
    assert differences(recorded, metrics | {"loss": 0.1 + 2**-56, "new": 1}) == {
        "loss": (0.1, 0.10000000000000002), "new": (None, 1)
    }  # fmt: skip


def test_a_directory_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="so it is not a run; give a run's directory"):
        replay_step(tmp_path, 1, print)
