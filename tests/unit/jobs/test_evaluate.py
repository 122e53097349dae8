"""What `quatro-ray eval` knows before it starts anything."""

from pathlib import Path

import pytest

from quatro_ray.config import TinyModelConfig
from quatro_ray.engines.tiny_model import make_model, save_pretrained
from quatro_ray.engines.tiny_tokenizer import make_tokenizer
from quatro_ray.errors import ConfigError
from quatro_ray.jobs.evaluate import evaluate_model, find_model
from quatro_ray.jobs.preflight import check_evaluation
from tests.make import config


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "model"
    tokenizer = make_tokenizer()
    save_pretrained(make_model(TinyModelConfig(kind="tiny"), tokenizer, 0), tokenizer, path)
    return path


def test_it_finds_what_would_end_it_later(tmp_path: Path, model: Path) -> None:
    wanted = config(
        tmp_path / "run",
        generator={"max_prompt_tokens": 16, "max_response_tokens": 8, "tensor_parallel_size": 3, "dtype": "float32"},
        data={
            "train": {"mine": {"kind": "jsonl", "path": "/nowhere.jsonl"}},
            "eval": {"sums": {"kind": "chain_sum", "num_questions": 16, "seed": 1}},
        },
    )
    with pytest.raises(ConfigError) as caught:
        evaluate_model(wanted, str(model), None, tmp_path / "out")
    first, *lines = str(caught.value).splitlines()
    assert first == "2 problems"
    assert "/nowhere.jsonl: cannot be read" in lines[0]
    assert "generator.tensor_parallel_size=3: must divide the model's 2 attention heads" in lines[1]
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match=r"/nowhere: cannot be loaded \(there is no such folder\)"):
        evaluate_model(config(tmp_path / "run"), "/nowhere", None, tmp_path / "out")


def test_learners_need_no_room(tmp_path: Path, model: Path) -> None:
    """An evaluation has none, so ranks that would not fit this machine are no problem."""
    wanted = config(tmp_path / "run", cluster={"cpus_per_rank": 999, "cpus_per_engine": 0.5, "cpus_per_verifier": 0.05})
    assert check_evaluation(wanted, str(model)).held_out["sums"]


def test_a_checkpoint_of_a_run_that_goes_on_needs_no_export(tmp_path: Path) -> None:
    wanted = config(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"--checkpoint step_2: .*checkpoints has no checkpoints"):
        find_model(wanted, None, "step_2")
    (tmp_path / "run" / "checkpoints" / "step_2").mkdir(parents=True)
    assert find_model(wanted, None, "step_2") == str(tmp_path / "run" / "model")
    with pytest.raises(ConfigError, match="has no export yet; give --model or --checkpoint"):
        find_model(wanted, None, None)
