"""Checks of many queries: in real processes, with the verdicts of one process, and none twice."""

import json
from pathlib import Path

import pytest

from quatro_ray.errors import DataError
from quatro_ray.rewards import query_checks
from quatro_ray.rewards.query_checks import QueryChecks
from quatro_ray.rewards.verdicts import Verdicts
from quatro_ray.types import Query
from tests.unit.rewards.test_workers import reward_configs

pytestmark = pytest.mark.process

REWARDS = reward_configs(answer={"kind": "integer"}, other={"kind": "exact", "only": ["b"]})
GOOD = [Query(f"q{i}", f"p{i}", str(i), source="a") for i in range(250)]
BAD = [Query("x", "p", "no number", source="a"), Query("y", "p", "3", source="b"), Query("z", "p", "  ", source="b")]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(query_checks, "_ALONE_S", -1)
    return tmp_path / "cache"


def reasons(queries: list[Query], said: list[str] | None = None) -> list[str | None]:
    lines: list[str] = [] if said is None else said
    return QueryChecks(REWARDS, lines.append).reasons(queries, "train.mine")


def no_more_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query_checks, "PROGRAM", "no.such.program")


def test_processes_find_what_one_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query_checks, "_SECONDS_BETWEEN_LINES", 0)
    said: list[str] = []
    found = reasons([*GOOD, *BAD], said)
    assert said[-1] == "data.train.mine: 253 of 253 answers checked" and len(said) == 3
    no_more_processes(monkeypatch)
    monkeypatch.setattr(query_checks, "_ALONE_S", 1000)
    assert found == reasons([*GOOD, *BAD])
    assert found[:250] == [None] * 250
    assert [bool(reason) for reason in found[250:]] == [True, False, True]
    assert str(found[250]).startswith("rewards.answer needs ")


def test_what_was_checked_is_remembered_by_its_content(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = reasons([*GOOD, *BAD])
    (file,) = (cache / "quatro_ray" / "verdicts").iterdir()
    file.write_text(file.read_text() + '\n["half a li')  # a process ended while it wrote
    with monkeypatch.context() as context:
        no_more_processes(context)
        moved = [Query(f"moved{i}", q.prompt, q.answer, source=q.source) for i, q in enumerate([*BAD, *GOOD])]
        assert reasons(moved) == [*first[250:], *first[:250]]
        with pytest.raises(DataError, match=r"data\.train\.mine: the check of its rows fails \(a worker process did"):
            reasons([*GOOD, Query("new", "p", "7", source="a")])
    assert reasons([Query("new", "p", "seven", source="a")])[0]
    checked = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("]")]
    assert len(checked) == 254


def test_other_rewards_and_other_software_have_files_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Verdicts(REWARDS).path
    assert Verdicts(REWARDS).path == path
    assert Verdicts(reward_configs(answer={"kind": "exact"})).path != path
    monkeypatch.setattr("quatro_ray.rewards.verdicts.version", lambda name: "0")
    assert Verdicts(REWARDS).path != path


def test_a_cache_that_cannot_be_written_is_told(cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    said: list[str] = []
    assert reasons(GOOD, said) == [None] * 250
    assert "cannot be written (Not a directory); the answers of data.train.mine are checked again" in said[-1]
