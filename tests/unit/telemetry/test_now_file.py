"""now.json: what goes on now, until the run ends."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from quatro_ray.telemetry.activity import Activity
from quatro_ray.telemetry.now_file import NowFile, read_now


def wait_until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def states(run_dir: Path) -> dict[str, dict[int, str]]:
    now = read_now(run_dir)
    return {role: {i: state for i, (state, _) in of.items()} for role, of in now.roles.items()} if now else {}


def test_it_follows_the_states_and_is_gone_at_the_end(tmp_path: Path) -> None:
    roles = {"learner": Activity()}
    roles["learner"].enter(0, "start")
    before = time.time()
    now_file = NowFile(tmp_path, roles, print, every_s=0.01)
    wait_until(lambda: states(tmp_path) == {"learner": {0: "start"}})
    roles["learner"].enter(0, "train")
    roles["generators"] = Activity()
    for engine in range(1024):
        roles["generators"].enter(engine, "busy")
    wait_until(lambda: len(states(tmp_path).get("generators", {})) == 1024)  # the learner trains since before
    assert states(tmp_path)["learner"] == {0: "train"}
    now = read_now(tmp_path)
    assert now is not None and now.host == os.uname().nodename
    assert before - 60 < now.roles["learner"][0][1] <= now.clock_s <= time.time()
    now_file.close()
    assert list(tmp_path.iterdir()) == [] and read_now(tmp_path) is None


def test_a_full_disk_is_waited_for_and_another_fault_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    fault, tries = errno.ENOSPC, 0

    def fail(*_: object) -> None:
        nonlocal tries
        tries += 1
        raise OSError(fault, os.strerror(fault))

    now_file = NowFile(tmp_path, {}, told.append, every_s=0.01)
    wait_until(lambda: read_now(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        wait_until(lambda: tries > 3)
        assert told == []
    old = read_now(tmp_path)
    wait_until(lambda: read_now(tmp_path) != old)
    fault = errno.EIO
    monkeypatch.setattr(os, "replace", fail)
    wait_until(lambda: told)
    now_file.close()
    assert told == [
        "now.json cannot be written any more ([Errno 5] Input/output error); `quatro-ray status` shows no states"
    ]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"clock_s": 1, "host": "a", "roles": {"x": [[1]]}}', "\0"])
def test_what_cannot_be_read_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "now.json").write_text(content)
    assert read_now(tmp_path) is None
