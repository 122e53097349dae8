"""The figures of the comparison with TRL, and the CPU time of a process tree."""

import json
import random
import sys
import time
from pathlib import Path

import pytest

from benchmarks.against_trl import CASES, NUM_WARMUP_STEPS, figures
from benchmarks.counting import LONG_TAIL, UNEVEN, Lengths, counts_right, make_data
from benchmarks.process_tree import watch_lines
from quatro_ray.types import Query, Response

CASE = CASES["uneven to 256"]


def record(rewards: list[float]) -> dict:
    """Steps of 100 tokens, one every 2 s and 3 CPU-seconds, the first after 20 s."""
    return {
        "moments": [[20 + 2 * i, 30 + 3 * i] for i in range(len(rewards))],
        "steps": [{"tokens/trained": 100, "reward/mean": reward} for reward in rewards],
    }


def test_speeds_are_those_after_the_first_steps() -> None:
    record_ = record([0.0] * CASE.num_steps)
    for step in record_["steps"][:NUM_WARMUP_STEPS]:
        step["tokens/trained"] = 10**6
    found = figures(CASE, record_)
    assert found["tokens_per_s"] == 50 and found["tokens_per_cpu_s"] == pytest.approx(100 / 3)
    assert found["first_step_s"] == 20 and found["pass_at_1_0.5_s"] is None


def test_learning_time_is_that_of_the_first_five_steps_with_the_mean() -> None:
    found = figures(CASE, record([0.0] * 10 + [1.0] * (CASE.num_steps - 10)))
    assert found["pass_at_1_0.5_s"] == 20 + 2 * 12  # steps 9 to 13 have a mean of 0.6
    assert found["first_reward"] == 0 and found["last_reward"] == 1


def test_each_target_has_its_time() -> None:
    found = figures(CASES["learning"], record([0.55] * 20 + [0.75] * 20))
    assert found["pass_at_1_0.5_s"] == 20 + 2 * 9 and found["pass_at_1_0.7_s"] == 20 + 2 * 27
    assert found["pass_at_1_0.8_s"] is None


@pytest.mark.parametrize("lengths", [UNEVEN, LONG_TAIL])
def test_questions_have_the_lengths_asked_for(lengths: Lengths, tmp_path: Path) -> None:
    make_data(lengths, tmp_path / "data.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text().splitlines()]
    tokens = sorted(len(row["answer"]) + 1 for row in rows)
    assert 0.95 * lengths.longest <= tokens[-1] <= lengths.longest
    assert tokens[len(tokens) // 2] == pytest.approx(lengths.median, rel=0.1)
    held_out = {json.loads(line)["prompt"] for line in (tmp_path / "held_out.jsonl").read_text().splitlines()}
    assert len(held_out) == 4 and not held_out & {row["prompt"] for row in rows}


def test_a_count_is_right_if_nothing_is_left_out() -> None:
    query = Query("0", "003qx", "002qx001qx000qx")
    assert counts_right(query, Response("002qx001qx000qx", 16, False)) == 1
    assert counts_right(query, Response("002qx000qx", 11, False)) == 0


BURN = "import time\nend = time.process_time() + 0.5\nwhile time.process_time() < end: pass\ntime.sleep(1)"
SCRIPT = """
import subprocess, sys, time
daemon = subprocess.Popen([sys.executable, "-c", sys.argv[2]], start_new_session=True)
file = open(sys.argv[1], "w", buffering=1)
file.write("one\\n")
daemon.wait()
file.write("two\\n")
time.sleep(0.5)
"""


@pytest.mark.process
def test_the_cpu_time_of_daemons_counts(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "lines"), BURN]
    one, two = watch_lines(command, tmp_path / "lines", tmp_path / "log", env={}, deadline_s=60)
    assert one.time < two.time and two.cpu >= 0.45


@pytest.mark.process
def test_a_command_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "lines"), "import time; time.sleep(60)"]
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match="ended with status"):
        watch_lines(command, tmp_path / "lines", tmp_path / "log", env={}, deadline_s=1)
    assert time.monotonic() - begun < 30


def test_lengths_are_drawn_from_the_seed() -> None:
    assert UNEVEN.num_counted(random.Random(0)) == UNEVEN.num_counted(random.Random(0))
