"""As people run it: `ray job submit` to a head with token authentication, and the command line on own data."""

import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.make import config_tree
from tests.real.nodes import BIN, ROOT, Head, ray_head

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    with ray_head(tmp_path_factory.mktemp("head"), num_cpus=2) as running:
        yield running


def test_a_client_without_the_token_is_refused(head: Head) -> None:
    refused = head.ray("job", "submit", "--address", head.dashboard, "--", "echo", "hello", token=False)
    assert refused.returncode != 0


def test_the_demo_as_a_submitted_job(head: Head, tmp_path: Path) -> None:
    """The whole demo, as `make demo` runs it, and everything it promises."""
    run_dir = tmp_path / "demo"
    command = ["quatro-ray", "train", str(ROOT / "configs/demo.yaml"), f"run.dir={run_dir}"]
    submitted = head.ray("job", "submit", "--address", head.dashboard, "--no-wait", "--", *command)
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    job = re.search(r"raysubmit_\w+", submitted.stdout)
    assert job
    status = ""
    deadline = time.monotonic() + 800
    while "succeeded" not in status and "failed" not in status and time.monotonic() < deadline:
        time.sleep(15)  # each look starts a Python with Ray in it
        shown = head.ray("job", "status", "--address", head.dashboard, job[0])
        status = (shown.stdout + shown.stderr).lower()
    logs = head.ray("job", "logs", "--address", head.dashboard, job[0]).stdout
    assert "succeeded" in status, f"{status}\n{logs}"
    assert "report: " in logs
    assert head.environment["RAY_AUTH_TOKEN"] not in logs

    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["pass_at_1_end"] >= summary["pass_at_1_start"] + 0.25
    assert summary["pass_at_8_end"] >= summary["pass_at_8_start"]
    assert 0.2 <= summary["pass_at_1_start"] <= 0.45
    assert summary["in_flight_updates"] >= 10
    assert summary["multi_version_rollouts"] > 0
    check_accounts(run_dir, max_staleness=4, steps=200)
    assert any(int(s) > 0 and n > 0 for s, n in summary["staleness_tokens"].items())
    check_files(run_dir)


def check_accounts(run_dir: Path, *, max_staleness: int, steps: int) -> None:
    summary = json.loads((run_dir / "summary.json").read_text())
    assert sum(summary["groups"].values()) == summary["groups_admitted"]
    assert summary["groups"]["dropped"] == sum(summary["drops"].values())
    assert summary["learner_steps"] == summary["weight_updates"] == steps
    assert max(int(s) for s in summary["staleness_tokens"]) <= max_staleness
    assert sum(summary["staleness_tokens"].values()) == summary["trained_tokens"] <= summary["generated_tokens"]
    assert all(v > 0 for v in summary["peak_rss_bytes"].values())
    phases = ("wait", "train", "sync", "evaluate", "export", "checkpoint")
    learner = sum(summary["seconds"].get(p, 0.0) for p in phases)
    assert 0 < learner < summary["seconds"]["total"]


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_files(run_dir: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    metrics = read_lines(run_dir / "metrics.jsonl")
    agreement = [m["rollout_corr/logprob_abs_diff"] for m in metrics if m["rollout_corr/logprob_abs_diff"] is not None]
    assert agreement and max(agreement) < 1e-3
    assert [m["step"] for m in metrics] == list(range(1, len(metrics) + 1))
    rollouts = read_lines(run_dir / "rollouts.jsonl")
    assert {"text", "reward", "versions"} <= rollouts[0]["rollouts"][0].keys()
    assert list((run_dir / "tensorboard").glob("events.out.tfevents.*"))
    assert list((run_dir / "checkpoints").glob("step_*/*optim_states.pt"))
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["run"]["seed"] == 0
    page = (run_dir / "report.html").read_text()
    assert page.count("<svg") == 14
    assert "<script" not in page and 'src="http' not in page
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "export")
    model = AutoModelForCausalLM.from_pretrained(run_dir / "export")
    out = model.generate(torch.tensor([tokenizer.encode("1+1=")]), max_new_tokens=4, do_sample=False)
    assert out.shape[1] > 4


def quatro_ray(*args: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    command = [str(BIN / "quatro-ray"), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, cwd=ROOT)


def check_evaluations(run: Path) -> None:
    """Of engines of their own: each of the version that was exported for it, while training went on."""
    evaluations = read_lines(run / "evaluations.jsonl")
    assert [(e["step"], e["version"], e["set"]) for e in evaluations] == [(v, v, "own") for v in (0, 2, 4)]
    groups = read_lines(run / "evaluation_rollouts.jsonl")
    assert len(groups) == 3 * 4
    assert all(len(g["rollouts"]) == 8 for g in groups)
    assert not [p for p in (run / "evaluating").iterdir() if p.is_dir()]


def check_converted(run: Path) -> None:
    """The checkpoint's ZeRO shards are the weights of the export, and were evaluated."""
    from safetensors.torch import load_file

    exported = load_file(run / "export" / "model.safetensors")
    converted: dict[str, Any] = {}
    for path in (run / "evaluation" / "model").glob("*.safetensors"):
        converted |= load_file(path)
    assert exported.keys() <= converted.keys()
    assert all(torch.equal(exported[name], converted[name]) for name in exported)
    (result,) = read_lines(run / "evaluation" / "evaluations.jsonl")
    assert result["num_queries"] == 4 and 0 <= result["pass_at_1"] <= 1


@pytest.fixture
def own_data(tmp_path: Path) -> Path:
    """A configuration over the user's own JSON lines, GRPO this time, with a schedule and two engines."""
    rows = [{"question": f"say {c}:", "gold": c} for c in "abcdefghijklmnopqrstuvwxyz"]
    for name, part in (("train", rows[:20]), ("eval", rows[20:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    tree = config_tree(
        tmp_path / "run",
        data={
            name: {"own": {"kind": "jsonl", "path": str(tmp_path / f"{name}.jsonl"), "answer_key": "gold"}}
            for name in ("train", "eval")
        },
        rewards={"answer": {"kind": "exact"}},
        objective={"kind": "grpo"},
        learner={"schedule": "cosine", "loss_agg_mode": "seq_mean_token_sum"},
        generator={"num_engines": 2},
        run={"num_steps": 4},
        evaluation={"num_engines": 1, "every_steps": 2, "samples_per_query": 8, "num_queries": 4},
        cluster={"cpus_per_engine": 0.3},
    )
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_training_on_own_prompts_with_two_engines(own_data: Path, tmp_path: Path) -> None:
    done = quatro_ray("train", str(own_data), timeout_s=400)
    assert done.returncode == 0, done.stdout + done.stderr
    check_accounts(tmp_path / "run", max_staleness=2, steps=4)
    check_files(tmp_path / "run")
    check_evaluations(tmp_path / "run")
    evaluated = quatro_ray("eval", str(own_data), "--checkpoint", "step_4", timeout_s=400)
    assert evaluated.returncode == 0, evaluated.stdout + evaluated.stderr
    check_converted(tmp_path / "run")
    again = quatro_ray("train", str(own_data))
    assert again.returncode == 2
    assert "is not empty; choose another, or set run.overwrite=true" in again.stderr
    assert "Traceback" not in again.stderr


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.train.own.path=/nowhere.jsonl", "/nowhere.jsonl: cannot be read"),
        ("data.train.own.answer_key=label", "train.jsonl:1: has no column 'label'"),
        ("rewards.answer.kind=integer", "train.jsonl:1: rewards.answer needs an integer answer, not 'a'"),
        ("model={kind: pretrained, path: /nowhere}", "model.path=/nowhere: cannot be loaded"),
        ("generator.max_prompt_tokens=3", "its prompt has 6 tokens"),
        ("cluster.cpus_per_rank=50", "CPUs and the cluster has"),
        ("run.dir=/etc", "run.dir=/etc: is not empty"),
    ],
)
def test_what_a_user_can_get_wrong_is_one_line(own_data: Path, override: str, expected: str) -> None:
    done = quatro_ray("train", str(own_data), override, timeout_s=120)
    assert done.returncode == 2, done.stdout + done.stderr
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_plan_and_validate_start_nothing(own_data: Path) -> None:
    plan = quatro_ray("plan", str(own_data))
    assert plan.returncode == 0
    assert "2 × generator" in plan.stdout and "4 queries × 4 rollouts = 16 rollouts a step" in plan.stdout
    valid = quatro_ray("validate", str(own_data))
    assert valid.returncode == 0
    assert yaml.safe_load(valid.stdout)["objective"]["kind"] == "grpo"


def test_the_example_of_a_reward_trains(tmp_path: Path) -> None:
    done = subprocess.run(
        [str(BIN / "python"), "examples/add_a_reward.py"], capture_output=True, text=True, timeout=400, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = read_lines(ROOT / "runs" / "add_a_reward" / "metrics.jsonl")
    assert len(metrics) == 3
    # between two steps that follow each other fast, nothing may have been scored
    parts = [m["reward/part_early"] for m in metrics if "reward/part_early" in m]
    assert parts and all(0 <= p <= 1 for p in parts)


def test_the_example_of_an_environment_trains(tmp_path: Path) -> None:
    """The policy asks, is given the result, and goes on; what it was given is not counted as sampled."""
    overrides = [
        f"run.dir={tmp_path / 'run'}",
        "run.num_steps=6",
        "model.warmup.max_steps=700",
        "evaluation.every_steps=6",
    ]
    done = subprocess.run(
        [str(BIN / "python"), "examples/calculator/calculator.py", *overrides],
        capture_output=True, text=True, timeout=600, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    check_accounts(tmp_path / "run", max_staleness=2, steps=6)
    rollouts = [r for g in read_lines(tmp_path / "run" / "rollouts.jsonl") for r in g["rollouts"]]
    asked = [r for r in rollouts if r["parts"]["calls"] > 0]
    assert asked and all(r["num_turns"] > 1 and "]" in r["transcript"] for r in asked)
    for r in asked:
        given = re.findall(r"\](\?|-?\d+);", r["transcript"])
        assert given and r["text"] not in ("", r["transcript"])
    assert any(m.get("rollout/turns", 0) > 1 for m in read_lines(tmp_path / "run" / "metrics.jsonl"))
