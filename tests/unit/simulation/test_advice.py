"""Advice from a run whose speeds are known, because it was simulated itself."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from quatro_ray import cli
from quatro_ray.config import Config, dump_config
from quatro_ray.config.run import ClusterConfig
from quatro_ray.errors import ConfigError
from quatro_ray.simulation.advice import advise, fit, options
from quatro_ray.simulation.decoding import EngineSpeed
from quatro_ray.simulation.measured import measure
from quatro_ray.simulation.ring import simulate
from quatro_ray.simulation.workload import Lengths, MeasuredLengths, Workload
from tests.make import config as make_config

SPEED = EngineSpeed(iteration_s=0.02, sequence_s=0.0, context_s=0.0, max_num_seqs=8)
WORKLOAD = Workload(Lengths(60, 0.5, 200), SPEED, step_s=0.0, token_s=2e-4, transfer_s=0.3, verify_s=0.0)


def config(num_engines: int, num_ranks: int) -> Config:
    return make_config(
        run={"num_steps": 60},
        generator={"num_engines": num_engines, "max_groups_in_flight": 8, "max_num_seqs": 8, "max_prompt_tokens": 8,
                   "max_response_tokens": 8, "dtype": "float32", "kv_cache_gib": 0.1},
        learner={"num_ranks": num_ranks, "learning_rate": 1e-3, "dtype": "float32", "tokens_per_micro_batch": 64},
        replay={"groups_per_step": 16, "group_size": 4, "max_staleness": 2},
    )  # fmt: skip


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two engines and two ranks, of which the engines are much slower."""
    path = tmp_path_factory.mktemp("advice") / "run"
    simulate(config(2, 2), WORKLOAD, num_warmup_steps=10, keep=path)
    (path / "config.yaml").write_text(dump_config(config(2, 2)))
    return path


def test_speeds_and_lengths_are_those_of_the_run(run_dir: Path) -> None:
    measured = measure(run_dir)
    assert measured.rank_s_per_token == pytest.approx(2 * 2e-4, rel=1e-3)
    assert measured.pause_s == pytest.approx(0.3, rel=0.2)
    iteration_s, itself = fit(measured)
    assert iteration_s == pytest.approx(0.02, rel=0.1)
    assert itself.step_s == pytest.approx(measured.step_s, rel=0.1)


def test_more_devices_go_to_the_slower_side(run_dir: Path) -> None:
    lines = list(advise(config(2, 2), run_dir))
    rows = [line for line in lines if re.match(r" +\d+ +\d+ ", line)]
    assert len(rows) == 3
    # an engine samples 400 tokens a second, and a rank trains 2,500
    wanted = (
        "advice: generator.num_engines=3 learner.num_ranks=1, (.*) times the tokens a second of 2 engines and 2 ranks"
    )
    found = re.fullmatch(wanted, lines[-1])
    assert found, lines
    assert float(found[1]) == pytest.approx(1.5, rel=0.1)


def test_a_split_that_is_right_is_kept(run_dir: Path) -> None:
    slow_learner = replace(measure(run_dir), rank_s_per_token=1.0)
    assert slow_learner.workload(0.02, 4).token_s == 0.25
    assert list(advise(config(1, 1), run_dir))[-1] == "advice: keep 1 engines and 1 ranks"


def test_devices_that_are_shared_or_taken_in_turn(run_dir: Path) -> None:
    """Nothing is there to split; and in turn, no token is sampled while the learner trains."""
    cluster = ClusterConfig(device="cpu", colocate=True, colocate_mode="alternating")
    both = config(2, 2).model_copy(update={"cluster": cluster})
    with pytest.raises(ConfigError, match="colocate=true: engines and ranks share all devices"):
        list(advise(both, run_dir))
    slow = replace(WORKLOAD, token_s=1e-3)
    apart, in_turn = (simulate(made, slow, num_warmup_steps=10) for made in (config(2, 2), both))
    assert in_turn.step_s > 1.2 * apart.step_s and in_turn.time_share["generators"]["paused"] > 0.3


def test_options_leave_a_rank_and_are_not_too_many() -> None:
    assert options(8, 1, 2) == [1, 2, 3, 4, 5, 6, 7]
    assert options(8, 4, 1) == [1]
    many = options(1024, 4, 77)
    assert len(many) == 10 and many[0] == 1 and many[-1] == 255 and 77 in many


def test_lengths_have_the_frequencies_of_the_histogram() -> None:
    lengths = MeasuredLengths({8: 1, 16: 2, 1024: 1})
    drawn = [n for i in range(500) for n in lengths.draw(i, 4, 0)]
    assert lengths.longest == 1024 + 127 and lengths.draw(3, 4, 0) == lengths.draw(3, 4, 0)
    assert sum(n == 8 for n in drawn) / len(drawn) == pytest.approx(0.25, abs=0.04)
    assert sum(16 <= n < 18 for n in drawn) / len(drawn) == pytest.approx(0.5, abs=0.04)
    assert all(n in (8, 16, 17) or 1024 <= n <= lengths.longest for n in drawn)


def test_what_cannot_be_measured_is_told(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run"):
        measure(tmp_path)
    (tmp_path / "config.yaml").write_text((run_dir / "config.yaml").read_text())
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:12]))
    with pytest.raises(ConfigError, match=r"has 6 steps that can be measured .*, and 10 are needed"):
        measure(tmp_path)


def test_the_command_prints_the_advice(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one_split = ["generator.num_engines=1", "learner.num_ranks=1"]
    command = ["quatro-ray", "plan", str(run_dir / "config.yaml"), *one_split, "--simulate", str(run_dir)]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0
    assert re.search(r"^advice: ", capsys.readouterr().out, re.MULTILINE)
