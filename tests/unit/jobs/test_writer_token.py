"""Of two attempts that write into one directory, the older one stops; storage without locks is the reason."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from quatro_ray.errors import ConfigError, TakenOver
from quatro_ray.jobs import writer_token
from quatro_ray.jobs.writer_token import FILE, WriterToken


def take(folder: Path, told: list[str] | None = None) -> WriterToken:
    return WriterToken.take(folder, ([] if told is None else told).append, wait_s=0)


def test_numbers_grow_and_an_attempt_that_has_ended_is_not_waited_for(tmp_path: Path) -> None:
    told: list[str] = []
    for number in (1, 2):
        with take(tmp_path, told) as token:
            token.check()
            written = json.loads((tmp_path / FILE).read_text())
            assert (written["number"], written["has_ended"]) == (number, False)
        assert json.loads((tmp_path / FILE).read_text())["has_ended"]
    assert not told


def test_one_that_died_on_this_machine_is_not_waited_for(tmp_path: Path) -> None:
    """The lock of the directory has told that it is dead."""
    told: list[str] = []
    take(tmp_path)
    take(tmp_path, told)
    assert not told


def test_one_on_another_machine_is_told_and_has_time_to_stop(tmp_path: Path) -> None:
    take(tmp_path)
    written = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps(written | {"boot": "another kernel", "host": "node-7"}))
    told: list[str] = []
    take(tmp_path, told)
    assert told == [f"run.dir={tmp_path}: attempt 1 on node-7 has not ended; it has 0 s to stop"]


def test_the_older_one_stops_its_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_token, "LOOK_EVERY_S", 0.01)
    older = take(tmp_path)
    ended: list[str] = []

    async def work() -> None:
        try:
            take(tmp_path)
            await asyncio.sleep(60)
        finally:
            ended.append("cleaned up")

    with pytest.raises(TakenOver, match=r"attempt 2 on .* writes here now; attempt 1 on .* writes nothing more"):
        asyncio.run(older.while_newest(work()))
    assert ended == ["cleaned up"]
    with pytest.raises(TakenOver):
        older.check()
    older.__exit__()
    assert not json.loads((tmp_path / FILE).read_text())["has_ended"]  # that is for the newer one to say


def test_work_that_ends_is_returned(tmp_path: Path) -> None:
    async def work() -> int:
        return 7

    assert asyncio.run(take(tmp_path).while_newest(work())) == 7


def test_of_many_at_one_moment_one_is_left(tmp_path: Path) -> None:
    """Processes without any lock; each that believes to be the newest looks again when all have tried."""
    program = (
        "import sys; from pathlib import Path; from quatro_ray.jobs.writer_token import WriterToken\n"
        "from quatro_ray.errors import TakenOver\n"
        "def meet(): print('here', flush=True); input()\n"
        "meet()\n"
        "try:\n"
        "    try: token = WriterToken.take(Path(sys.argv[1]), print, wait_s=0)\n"
        "    finally: meet()\n"
        "    token.check(); print('wrote')\n"
        "except TakenOver: print('stopped')\n"
    )
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", program, str(tmp_path)]
    processes = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(6)]
    for _ in range(2):  # all have imported; all have tried
        for process in processes:
            assert process.stdout is not None
            while process.stdout.readline() != "here\n":
                assert process.poll() is None
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
    said = sorted(process.communicate(timeout=120)[0].strip() for process in processes)
    assert said == ["stopped"] * 5 + ["wrote"]


def test_a_file_that_is_not_understood_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"number": ')
    with pytest.raises(ConfigError, match=r"writer\.json: cannot be understood .* and remove it"):
        take(tmp_path)
