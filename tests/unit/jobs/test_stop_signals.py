"""SIGINT, SIGTERM and SIGHUP during the start, during training and twice."""

from __future__ import annotations

import asyncio
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from quatro_ray.errors import Preempted
from quatro_ray.jobs.stop_signals import StopSignals

ALL = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def none_is_ignored() -> Iterator[None]:
    """Background jobs of a shell ignore SIGINT, nohup SIGHUP, and so do these tests and what they start."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in ALL}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", ALL)
def test_during_the_start_it_ends_the_job(number: signal.Signals) -> None:
    before = [signal.getsignal(n) for n in ALL]
    told = f"received {number.name} during the start, before training began"
    with pytest.raises(Preempted, match=told) as caught, StopSignals():
        os.kill(os.getpid(), number)
        time.sleep(10)
    assert caught.value.number == number
    assert [signal.getsignal(n) for n in ALL] == before


@pytest.mark.parametrize("number", ALL)
def test_in_the_loop_it_calls_what_is_to_be_called(number: signal.Signals) -> None:
    async def train(signals: StopSignals) -> None:
        told = asyncio.Event()
        with signals.in_the_loop():
            signals.call(told.set)
            os.kill(os.getpid(), number)
            await asyncio.wait_for(told.wait(), 10)
            os.kill(os.getpid(), signal.SIGTERM)  # a scheduler may repeat it
            await asyncio.sleep(0.1)
            later: list[str] = []
            signals.call(lambda: later.append("told"))  # the controller is made only now
            assert later == ["told"]
        os.kill(os.getpid(), signal.SIGTERM)  # while all is put away
        raise Preempted("told to stop")

    with pytest.raises(Preempted, match="told to stop") as caught, StopSignals() as signals:
        asyncio.run(train(signals))
    assert caught.value.number == number


PROGRAM = """
import asyncio, sys
from quatro_ray.jobs.stop_signals import StopSignals

async def train(signals):
    told = asyncio.Event()
    with signals.in_the_loop():
        signals.call(told.set)
        print("ready", flush=True)
        if len(sys.argv) > 1:
            open(sys.argv[1] + ".waits", "w").close()
        await told.wait()
        for _ in range(100):
            await asyncio.sleep(0.1)
            print("saving", flush=True)
            if len(sys.argv) > 1:
                open(sys.argv[1], "w").close()
                return

with StopSignals() as signals:
    asyncio.run(train(signals))
"""


def test_a_second_sigint_ends_the_process_at_once() -> None:
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout and process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == b"saving\n"
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=5)
    assert process.returncode == 128 + signal.SIGINT
    assert told == b"ended: received SIGINT again; rerun with run.resume=auto to continue\n"


def test_the_end_of_the_terminal_does_not_end_what_is_to_be_saved(tmp_path: Path) -> None:
    """The output goes to a terminal that closes: writing to it would be an error."""
    master, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "saved")],
        stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
    )  # fmt: skip
    os.close(terminal)
    assert b"ready" in os.read(master, 100)
    while not (tmp_path / "saved.waits").exists():
        time.sleep(0.01)
    os.close(master)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=20) == 0
    assert (tmp_path / "saved").exists()


def test_nohup_stays_in_force() -> None:
    script = f"import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n{PROGRAM}"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout and process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == b"saving\n"
    process.kill()
    process.communicate()
