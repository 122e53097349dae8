"""The audit of run directories that the real controller, buffer and recorder wrote, whole and damaged one by one."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from quatro_ray.errors import ConfigError, LedgerError, Preempted
from quatro_ray.jobs.audit import audit_run
from quatro_ray.jobs.audit_view import view
from quatro_ray.replay import schema
from tests.unit.faults import FAULTS, inflict, make_world
from tests.unit.jobs.finished_run import write_config, write_summary
from tests.unit.jobs.writing import steps_made, writing
from tests.unit.world import World


def contents(run: Path) -> dict[Path, bytes]:
    """Return what all files hold, but for the two that SQLite needs to read the ledger."""
    files = [p for p in run.rglob("*") if p.is_file() and not p.name.endswith(("-wal", "-shm"))]
    return {path: path.read_bytes() for path in files}


def found(run: Path, *, thorough: bool = False) -> dict[str, list[str]]:
    return {name: list(what) for name, what in audit_run(run, thorough=thorough).findings.items()}


def test_a_run_that_lost_its_learner_is_clean(run: Path) -> None:
    before = contents(run)
    audit = audit_run(run, thorough=True)
    assert audit.findings == {}
    assert (audit.state, audit.step, audit.num_steps, audit.num_compared) == ("finished", 12, 12, 12)
    assert audit.groups == {"trained": 48, "dropped": sum(fate.num_groups for fate in audit.dropped.values())}
    assert audit.dropped["overlong"].num_groups == 3 and audit.dropped["verifier_timeout"].num_groups == 1
    assert audit.checkpoints == [2, 8, 12]
    assert json.loads(json.dumps(audit.record()))["is_clean"] is True
    assert contents(run) == before


def change(sql: str) -> Callable[[Path], None]:
    """Change the ledger as a fault of the program would: digests and totals fit what is written."""

    def damage(run: Path) -> None:
        with closing(sqlite3.connect(run / "ledger.sqlite")) as db:
            schema._add_functions(db)
            db.executescript(sql)

    return damage


def change_lines(name: str, edit: Callable[[list[str]], list[str]]) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        lines = (run / name).read_text().splitlines(keepends=True)
        (run / name).write_text("".join(edit(lines)))

    return damage


def truncate(run: Path) -> None:
    path = run / "checkpoints" / "step_12" / "weights"
    path.write_bytes(path.read_bytes()[:1])


def cut_ledger(run: Path) -> None:
    path = run / "ledger.sqlite"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


_TOTALS = "UPDATE tally SET total = total - 1 WHERE kind = 'state' AND name = 'trained';"
DAMAGES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "a group is missing": (change(f"DELETE FROM groups WHERE group_id = 7; {_TOTALS}"), "ids", "no group has id 7"),
    "a group was trained by two steps": (
        change("UPDATE groups SET learner_version = 2 WHERE group_id = (SELECT MIN(group_id) FROM groups)"),
        "trained", "step 3, from version 2, was trained by 5 groups, not 4",
    ),
    "a group was recorded by two steps": (
        change_lines("rollouts.jsonl", lambda lines: [*lines, lines[0].replace('"step": 1,', '"step": 2,')]),
        "rollouts", "step 2: rollouts.jsonl has groups",
    ),
    "two steps have one number": (
        change("UPDATE versions SET step = step - 1 WHERE version = 3"),
        "versions", "version 3 counts 2 steps instead of 3",
    ),
    "a version is missing": (
        change("DELETE FROM versions WHERE version = 3"), "versions", "version 4 stands where 3 should",
    ),
    "a step is recorded twice": (
        change_lines("metrics.jsonl", lambda lines: [*lines[:5], *lines[4:]]),
        "metrics", "metrics.jsonl: step 5 is there 2 times",
    ),
    "a step is not recorded": (
        change_lines("metrics.jsonl", lambda lines: lines[:4] + lines[5:]),
        "metrics", "metrics.jsonl: step 5 is missing",
    ),
    "a line is damaged": (
        change_lines("metrics.jsonl", lambda lines: [*lines[:4], lines[4][: len(lines[4]) // 2] + "\n", *lines[5:]]),
        "metrics.jsonl", "metrics.jsonl: 1 lines cannot be read",
    ),
    "a line has no step": (
        change_lines("rollouts.jsonl", lambda lines: ["{}\n", *lines[1:]]),
        "rollouts.jsonl", "rollouts.jsonl: 1 lines cannot be read",
    ),
    "the summary is cut": (
        change_lines("summary.json", lambda lines: [lines[0][:50]]), "summary.json", "is not a JSON object",
    ),
    "a drop has no reason": (
        change("DROP TRIGGER tally_reason; UPDATE groups SET reason = NULL WHERE group_id = 9"),
        "states", "group 9 was dropped for None",
    ),
    "an evaluation is there twice": (
        change_lines("evaluations.jsonl", lambda lines: [*lines, lines[0]]),
        "evaluations", "set at step 0 is there 2 times",
    ),
    "an evaluation is gone": (
        change_lines("evaluations.jsonl", lambda lines: lines[1:]), "evaluations", "set at step 0 is missing",
    ),
    "all evaluations are gone": (
        change_lines("evaluations.jsonl", lambda _: []), "evaluations", "set at step 12 is missing",
    ),
    "a checkpoint is cut": (truncate, "checkpoints", "checkpoint step_12: weights has 1 bytes instead of 2"),
    "the newest checkpoint is gone": (
        lambda run: shutil.rmtree(run / "checkpoints" / "step_12"),
        "checkpoints", "checkpoint step_12: was written, and is missing",
    ),
    "all checkpoints are gone": (
        lambda run: shutil.rmtree(run / "checkpoints"),
        "checkpoints", "checkpoint step_12: was written, and is missing",
    ),
    "a pinned checkpoint is gone": (
        lambda run: shutil.rmtree(run / "checkpoints" / "step_2"),
        "checkpoints", "checkpoint step_2: was written, and is missing; replay.keep_steps keeps it",
    ),
    "a manifest lists nothing": (
        lambda run: (run / "checkpoints" / "step_12" / "manifest.json").write_text('{"files": {}}'),
        "checkpoints", "checkpoint step_12: manifest.json does not list state.json",
    ),
    "the last group is missing": (
        change(
            "UPDATE tally SET total = total - 1 WHERE kind = 'state' AND name = (SELECT state FROM groups ORDER BY "
            "group_id DESC LIMIT 1); DELETE FROM groups WHERE group_id = (SELECT MAX(group_id) FROM groups)"
        ),
        "ids", "no group has id ",
    ),
    "a pinned checkpoint is cut": (
        lambda run: (run / "checkpoints" / "step_2" / "weights").write_text(""),
        "checkpoints", "checkpoint step_2: weights has 0 bytes instead of 1",
    ),
    "a checkpoint has no manifest": (
        lambda run: (run / "checkpoints" / "step_8" / "manifest.json").unlink(),
        "checkpoints", "checkpoint step_8: manifest.json is missing",
    ),
    "the ledger is cut": (cut_ledger, "ledger", "ledger.sqlite is damaged: "),
    "the ledger is gone": (
        lambda run: (run / "ledger.sqlite").unlink(),
        "ledger", "ledger.sqlite is missing or empty, and metrics.jsonl has steps",
    ),
    "a row was changed by another program": (
        change("DROP TRIGGER digest_groups_changed; UPDATE groups SET mean_reward = 7 WHERE group_id = 3"),
        "ledger", "1 rows of its table groups do not have the values that were written, the first at 3",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "check", "what"), DAMAGES.values(), ids=DAMAGES)
def test_what_is_lost_doubled_or_damaged_is_named(
    run: Path, damage: Callable[[Path], object], check: str, what: str
) -> None:
    damage(run)
    named = found(run)[check]
    assert any(what in line for line in named), named
    assert f"  {check}: " in view(audit_run(run))


def edit_segment(edit: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(run: Path) -> None:
        for path in (run / "ledger.rollouts").iterdir():
            path.write_bytes(edit(path.read_bytes()))

    return damage


def lose_rollouts(run: Path) -> None:
    shutil.rmtree(run / "ledger.rollouts")


LOST_ROLLOUTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "the folder is gone": (lose_rollouts, "is missing; it holds the rollouts of groups ["),
    "a segment is cut": (edit_segment(lambda data: data[:-1]), "is cut; it holds the rollouts of groups ["),
    "a kept step has no rows": (
        change(
            "DELETE FROM rollouts WHERE group_id IN (SELECT group_id FROM groups JOIN versions ON version = "
            "learner_version WHERE state = 'trained' AND step = 2)"
        ),
        "step 3 is in replay.keep_steps, and the rollouts of groups [",
    ),
}


@pytest.mark.parametrize(("damage", "what"), LOST_ROLLOUTS.values(), ids=LOST_ROLLOUTS)
def test_rollouts_that_are_lost_are_named(run: Path, damage: Callable[[Path], None], what: str) -> None:
    damage(run)
    named = found(run)["stored"]
    assert any(what in line for line in named), named


def test_changed_bytes_of_rollouts_are_found_if_they_are_read(run: Path) -> None:
    edit_segment(lambda data: bytes(len(data)))(run)
    assert found(run) == {}
    (line,) = found(run, thorough=True)["stored"]
    assert "does not have the checksums that it was written with; it holds the rollouts of groups [" in line


def test_rollouts_may_be_gone_until_a_restored_ledger_is_checked(run: Path) -> None:
    lose_rollouts(run)
    for path in run.glob("ledger.sqlite*"):
        path.unlink()
    shutil.copyfile(run / "checkpoints" / "step_12" / "ledger.sqlite", run / "ledger.sqlite")
    assert "stored" not in found(run)


def test_a_folder_of_checkpoints_that_cannot_be_listed_is_told(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").touch()
    with pytest.raises(ConfigError, match="cannot be listed"):
        audit_run(run)


def test_a_checkpoint_that_was_found_damaged_is_not_missed(run: Path) -> None:
    (run / "checkpoints" / "step_12").rename(run / "checkpoints" / "step_12.damaged")
    assert found(run) == {}


def test_a_changed_byte_of_a_checkpoint_is_found_if_its_files_are_read(run: Path) -> None:
    path = run / "checkpoints" / "step_12" / "weights"
    path.write_text("13")
    assert found(run) == {}
    assert found(run, thorough=True) == {
        "checkpoints": ["checkpoint step_12: weights does not have the checksum that it was written with"]
    }


def test_lengths_and_pass_rates_are_weighted_by_their_numbers(run: Path) -> None:
    """A bias against long responses can be seen."""

    def edit(lines: list[str]) -> list[str]:
        steps = [json.loads(line) for line in lines]
        for step in steps:
            step |= {"rollout/num": 8, "rollout/response_tokens_mean": 100.0, "pass_rate/mean": 0.5}
            step.pop("drops/overlong", None)
        steps[1] |= {"drops/overlong": 1, "drops/overlong_response_tokens_mean": 400.0, "drops/overlong_pass_rate": 0.0}
        steps[2] |= {"drops/overlong": 2, "drops/overlong_response_tokens_mean": 100.0, "drops/overlong_pass_rate": 0.3}
        return [json.dumps(step) + "\n" for step in steps]

    change_lines("metrics.jsonl", edit)(run)
    audit = audit_run(run)
    assert (audit.trained.response_tokens, audit.trained.pass_rate) == (100.0, 0.5)
    overlong = audit.dropped["overlong"]
    assert (overlong.response_tokens, overlong.pass_rate) == (200.0, pytest.approx(0.2))
    assert "200.0 (+100%)" in view(audit)


def test_a_run_before_its_first_group_is_clean(run: Path) -> None:
    for path in run.iterdir():
        if path.name != "config.yaml":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    audit = audit_run(run)
    assert (audit.findings, audit.state, audit.step) == ({}, "not finished", 0)
    assert "clean: " in view(audit)


def test_what_is_no_run_and_what_cannot_be_audited_is_told(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no run, as it has no config\.yaml; give the run\.dir of a run"):
        audit_run(tmp_path)
    change("PRAGMA user_version=7")(run)
    with pytest.raises(LedgerError, match="is a ledger of version 7, and this quatro_ray reads version 1"):
        audit_run(run)
    (run / "config.yaml").write_text("run: {num_steps: 12}\n")
    with pytest.raises(
        ConfigError, match=r"replay\.groups_per_step must be a whole number, not None; restore the file"
    ):
        audit_run(run)


@pytest.mark.parametrize("seed", range(4))
def test_at_any_time_of_a_run_under_faults_nothing_is_lost_or_doubled(tmp_path: Path, seed: int) -> None:
    """Also between a fall-back in the ledger and that of the records, and after the death of the controller."""
    rng = random.Random(seed)
    world = make_world(tmp_path, replay={"max_staleness": 2}, evaluation={"every_steps": 3})
    write_config(world)
    planned = [(rng.uniform(0.3, 3), rng.choice([f for f in FAULTS if f != "bit flips"]), rng.randrange(2))
               for _ in range(5)]  # fmt: skip
    audits = []

    def look() -> None:
        audits.append(audit_run(tmp_path))
        assert audits[-1].findings == {}

    async def faults(world: World) -> None:
        while planned:
            for _ in range(int(planned[0][0] / 0.25)):
                await asyncio.sleep(0.25)
                look()
            _, fault, which = planned.pop(0)
            inflict(world, fault, which)

    world.faults = faults
    for life in range(20):
        try:
            write_summary(world, world.run(resume=life > 0))
            break
        except (Preempted, asyncio.CancelledError):
            look()
    look()
    assert (audits[-1].state, audits[-1].step, audits[-1].num_compared) == ("finished", 12, 12)
    assert len({a.step for a in audits}) > 3


@pytest.mark.process
def test_a_run_that_another_process_writes_is_not_disturbed(tmp_path: Path) -> None:
    """Nothing is found while it runs, nor after it was killed in the middle of a step."""
    path = tmp_path / "run"
    with writing(path) as process:
        seen = [0]
        while len(seen) < 10:
            while (made := steps_made(process)) <= seen[-1]:
                pass
            audit = audit_run(path)
            assert (audit.findings, audit.state) == ({}, "running")
            assert audit.step >= made
            seen.append(audit.step)
        process.kill()
        process.wait(60)
        audit = audit_run(path)
    assert (audit.findings, audit.state) == ({}, "not finished")
    assert audit.step >= seen[-1] and audit.step - audit.num_compared <= 1
