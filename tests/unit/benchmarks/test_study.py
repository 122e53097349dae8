"""The study's parts: a model that scores what it samples, exact staleness, honest claims, a file that survives."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import reasoning_gym
import torch

from benchmarks import study
from benchmarks.study import START_POLICIES, finished
from benchmarks.toy.grid import SEEDS, SEEDS_OF_250, TASKS, Spec, all_specs
from benchmarks.toy.model import ToyModel
from benchmarks.toy.report import write_report
from benchmarks.toy.summary import Cell, claims, tabulate
from benchmarks.toy.tasks import make_task
from benchmarks.toy.trainer import ToyTrainer
from benchmarks.toy.warmup import start_policy


@pytest.fixture(scope="module")
def model() -> ToyModel:
    torch.manual_seed(0)
    task = make_task("palindrome")
    return ToyModel(task.vocabulary, task.prompts.shape[1] + task.max_response_tokens)


def test_what_was_sampled_is_scored_the_same(model: ToyModel) -> None:
    """With keys and values kept against teacher-forced; this is the importance ratio at staleness 0."""
    task = make_task("palindrome")
    generator = torch.Generator().manual_seed(1)
    responses, logprobs, counted = model.sample(task.prompts[:5], 6, task.max_response_tokens, task.eos, generator)
    scored = model.score(task.prompts[:5], responses).gather(-1, responses[..., None])[..., 0]
    torch.testing.assert_close(torch.where(counted, scored, 0.0), logprobs, rtol=1e-4, atol=1e-5)
    ended = (responses == task.eos).cumsum(-1)
    assert torch.equal(counted, (ended - (responses == task.eos).long()) == 0)


def test_rewards_are_those_of_the_library() -> None:
    task = make_task("palindrome")
    dataset: Any = reasoning_gym.create_dataset("palindrome_generation", size=6000, seed=0, min_length=6, max_length=6)
    entry = dataset[0]
    letters = entry["metadata"]["letters"]
    right = entry["metadata"]["generated_palindrome"]
    symbols = {c: i for i, c in enumerate(sorted(set("abcdefghijklmnopqrstuvwxyz=") | {"$"}))}

    def tensor(text: str) -> torch.Tensor:
        return torch.tensor([symbols[c] for c in text.ljust(7, "$")])

    swapped = right[1] + right[0] + right[2:4] + right[0] + right[1]
    texts = [right, swapped, right[:5], right + "a", "".join(letters), right[::-1]]
    responses = torch.stack([tensor(t) for t in texts])[None]
    got = task.rewards(responses, tensor(right)[None])[0].tolist()
    expected = [float(dataset.score_answer(t, entry) == 1.0) for t in texts]
    assert got == expected
    assert set(expected) == {0.0, 1.0}


@pytest.mark.parametrize("staleness", [0, 3])
def test_staleness_is_exact(model: ToyModel, staleness: int, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = Spec("palindrome", "quatro", staleness, 1, True, 0)
    trainer = ToyTrainer(model, make_task("palindrome"), spec.objective(), spec.learner(), staleness, seed=0)
    seen: list[tuple[int, int]] = []
    original = trainer._score

    def score(batch: Any) -> Any:
        seen.append((trainer.version, batch.version))
        return original(batch)

    monkeypatch.setattr(trainer, "_score", score)
    for _ in range(6):
        trainer.step()
    assert sorted(set(seen)) == [(k, max(0, k - staleness)) for k in range(6)]


def test_specs_are_distinct_and_valid() -> None:
    specs = all_specs()
    assert len({s.key for s in specs}) == len(specs) == 315
    for spec in {s.method: s for s in specs}.values():
        spec.objective()
        spec.learner()


@pytest.mark.parametrize("task", TASKS)
def test_starting_policies_are_files_of_the_repository(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.toy.warmup._warm_up", lambda *_: pytest.fail("it would be trained"))
    seeds = SEEDS_OF_250 if task == "chain_250" else SEEDS
    first, *others = [start_policy(task, seed, START_POLICIES).state_dict() for seed in seeds]
    assert all(not torch.equal(first["tokens.weight"], other["tokens.weight"]) for other in others)


def make_run(method: str, finals: list[float], control: bool = True, seed: int = 0, **changes: Any) -> dict[str, Any]:
    points = [
        {"step": 101 * i, "pass_at_1": p, "pass_at_16": 0.9, "unique_correct": 7, "entropy": 0.5}
        for i, p in enumerate(finals)
    ]
    spec = {"task": "addition", "method": method, "staleness": 8, "multiple": 1, "control": control, "seed": seed}
    measured = {"commit": "abc", "evaluations": points, "frac_steps_controlled": 0.0, "seconds": 1.0}
    return spec | measured | changes


def test_a_cell_is_the_mean_over_seeds() -> None:
    table = tabulate([make_run("quatro", [0.2, 0.6, 0.5]), make_run("quatro", [0.2, 0.4, 0.1], seed=1)])
    figures = table[Cell("addition", 8, 1)]["quatro", True]
    assert figures.final == pytest.approx(0.3)
    assert (figures.lowest, figures.highest) == (0.1, 0.5)
    assert figures.best == pytest.approx(0.5)
    assert figures.area == pytest.approx(((0.4 + 0.55) / 2 + (0.3 + 0.25) / 2) / 2)
    assert (figures.num_runs, figures.collapsed) == (2, 1)


def test_final_is_the_mean_over_the_last_quarter() -> None:
    run = make_run("quatro", [0.2, 0.3, 0.4, 0.8])
    for point, step in zip(run["evaluations"], (0, 299, 300, 400), strict=True):
        point["step"] = step
    assert tabulate([run])[Cell("addition", 8, 1)]["quatro", True].final == pytest.approx(0.6)
    only = make_run("quatro", [0.2, 0.3])
    only["evaluations"][1]["step"] = 20
    assert tabulate([only])[Cell("addition", 8, 1)]["quatro", True].final == 0.3


def test_claims_hold_or_name_the_cells_where_they_do_not() -> None:
    good = claims([make_run("quatro", [0.2, 0.6]), make_run("grpo", [0.2, 0.1], control=False)])
    assert [claim for claim, holds in good["holds"].items() if not holds] == [
        "at 250 tokens above QUATRO with one budget"
    ], "no run of that length was given"
    assert good["baseline_cells_collapsed"] == 1
    bad = claims(
        [
            make_run("quatro", [0.2, 0.1]),
            make_run("m2po", [0.2, 0.15], control=False),
            make_run("gspo", [0.2, 0.11]),
        ]
    )
    assert bad["exceptions"]["never collapses"] == ["addition s=8 1x"]
    assert bad["exceptions"]["within 0.02 of the best in every cell"] == ["addition s=8 1x: m2po, no control +0.050"]
    assert bad["exceptions"]["above every baseline that collapses as published"] == ["addition s=8 1x: m2po"]
    runs = [make_run("quatro", [0.2, 0.6]), make_run("gspo", [0.2, 0.61])]
    runs[1]["evaluations"][-1] |= {"entropy": 0.6, "pass_at_16": 0.95}
    close = claims(runs)["holds"]
    assert claims(runs)["exceptions"]["above every baseline that collapses as published"] == ["not run yet"]
    assert not close["highest entropy of those within 0.02"]
    assert not close["highest pass@16 of those within 0.02"]


def test_baselines_are_compared_on_the_seeds_that_they_have() -> None:
    """A seed has its own starting policy: a mean over other seeds says nothing."""
    runs = [make_run("quatro", [0.2, 0.6]), make_run("quatro", [0.1, 0.2], seed=1), make_run("dapo", [0.2, 0.61])]
    assert claims(runs)["holds"]["within 0.02 of the best in every cell"]
    runs.append(make_run("dapo", [0.1, 0.3], seed=1))
    exceptions = claims(runs)["exceptions"]["within 0.02 of the best in every cell"]
    assert exceptions == ["addition s=8 1x: dapo +0.055"]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_every_run_is_made_once(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "run_one", lambda spec, commit: {"key": spec.key})
    specs = all_specs()[:7]
    with ThreadPoolExecutor(workers) as pool:
        made = [r["key"] for r in study._in_turn(pool, iter(specs), workers, float("inf"))]  # type: ignore[arg-type]
        assert sorted(made) == sorted(s.key for s in specs)
        assert len(list(study._in_turn(pool, iter(specs), workers, 0.0))) == workers  # type: ignore[arg-type]


def test_the_file_of_figures_survives_an_interruption(tmp_path: Path) -> None:
    path = tmp_path / "figures.jsonl"
    whole = json.dumps(make_run("grpo", [0.2, 0.3]))
    path.write_text(whole + "\n" + whole[:40])
    assert list(finished(path)) == ["addition/grpo/8/1/True/0"]
    assert path.read_text() == whole + "\n"
    assert finished(tmp_path / "none.jsonl") == {}


def test_the_report_replaces_only_its_part(tmp_path: Path) -> None:
    (tmp_path / "results.md").write_text("before\n<!-- study: begin -->\nof last time\n<!-- study: end -->\nafter\n")
    runs = [make_run("quatro", [0.2, 0.6]), make_run("grpo", [0.2, 0.1], control=False)]
    write_report(runs, tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert text.startswith("before\n<!-- study: begin -->\n2 of 315 runs")
    assert text.endswith("<!-- study: end -->\nafter\n") and "of last time" not in text
    assert "| quatro | 0.600 / 0.900 / 0.50 |" in text
    assert "0.100 / 0.900 / 0.50 †1" in text
    assert len(list((tmp_path / "plots").glob("*.svg"))) == 4
    with pytest.raises(ValueError, match="no figures yet"):
        write_report([], tmp_path)
