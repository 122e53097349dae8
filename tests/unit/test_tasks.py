"""Datasets and verifiers."""

import json
from itertools import islice
from pathlib import Path

import pytest

from quatro_ray.config import ChainSumTaskConfig, JsonLinesTaskConfig
from quatro_ray.errors import ConfigError, DataError
from quatro_ray.tasks import verifiers
from quatro_ray.tasks.base import shuffled_epochs
from quatro_ray.tasks.prompts import encode_prompt
from quatro_ray.tasks.registry import make_dataset, make_verifier
from quatro_ray.types import Query

QUERY = Query("q", "12+34=", "46")


@pytest.mark.parametrize(
    ("text", "reward"),
    [("46", 1), (" 46\n", 1), ("+46", 1), ("046", 1), ("46.0", 0), ("The answer is 46", 0), ("4 6", 0), ("", 0),
     ("-46", 0), ("9" * 100_000, 0), ("٤٦", 0)],
)  # fmt: skip
def test_integer(text: str, reward: float) -> None:
    assert verifiers.integer(QUERY, text).reward == reward


def test_exact() -> None:
    assert verifiers.exact(Query("q", "p", " yes "), "yes\n").reward == 1
    assert verifiers.exact(Query("q", "p", "yes"), "Yes").reward == 0
    assert make_verifier("exact") is verifiers.exact
    with pytest.raises(ConfigError, match="must be one of"):
        make_verifier("guess")


def chain_sum(**over: int) -> ChainSumTaskConfig:
    return ChainSumTaskConfig(kind="chain_sum", **({"num_questions": 500, "num_held_out": 50} | over))  # type: ignore[arg-type]


def test_chain_sum_questions_are_distinct_and_right() -> None:
    dataset = make_dataset(chain_sum(min_terms=2, max_terms=3), seed=0)
    prompts = [q.prompt for q in [*dataset.train, *dataset.held_out]]
    assert len(prompts) == len(set(prompts)) == 500
    assert len(dataset.held_out) == 50
    for query in [*dataset.train, *dataset.held_out]:
        terms = query.prompt.removesuffix("=").replace("-", "+-").split("+")
        assert sum(map(int, terms)) == int(query.answer)


def test_chain_sum_depends_on_the_seed_alone() -> None:
    assert make_dataset(chain_sum(), 1).train == make_dataset(chain_sum(), 1).train
    assert make_dataset(chain_sum(), 1).train != make_dataset(chain_sum(), 2).train


def test_chain_sum_says_when_there_are_not_enough_questions() -> None:
    with pytest.raises(ConfigError, match="gave only"):
        make_dataset(chain_sum(max_digits=1, num_questions=5000), 0)


def test_epochs_hold_every_query_once_each_in_its_own_order() -> None:
    queries = [Query(str(i), "p", "a") for i in range(20)]
    ids = [q.query_id for q in islice(shuffled_epochs(queries, 3), 60)]
    epochs = [ids[0:20], ids[20:40], ids[40:60]]
    assert all(sorted(e) == sorted(q.query_id for q in queries) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert ids == [q.query_id for q in islice(shuffled_epochs(queries, 3), 60)]


def jsonl(tmp_path: Path, *lines: str, verifier: str = "exact") -> JsonLinesTaskConfig:
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    (tmp_path / "eval.jsonl").write_text('{"prompt": "held out", "answer": 1}')
    return JsonLinesTaskConfig(
        kind="jsonl",
        train_path=tmp_path / "train.jsonl",
        eval_path=tmp_path / "eval.jsonl",
        verifier=verifier,  # type: ignore[arg-type]
    )


def test_json_lines(tmp_path: Path) -> None:
    messages = [{"content": "two?", "role": "user", "name": "x"}]
    lines = ['{"prompt": "1+1=", "answer": 2, "extra": 0}', "", json.dumps({"prompt": messages, "answer": " b "})]
    dataset = make_dataset(jsonl(tmp_path, *lines), 0)
    first = dataset.train[0]
    assert (first.query_id, first.prompt, first.answer) == ("train.jsonl:1", "1+1=", "2")
    assert dataset.train[1].query_id == "train.jsonl:3"

    class Tokenizer:
        def apply_chat_template(self, messages: list, add_generation_prompt: bool, return_dict: bool) -> list:
            return [messages, add_generation_prompt]

        def encode(self, text: str) -> list:
            return [text]

    assert encode_prompt(Tokenizer(), dataset.train[1].prompt) == [[{"role": "user", "content": "two?"}], True]
    assert encode_prompt(Tokenizer(), dataset.train[0].prompt) == ["1+1="]


@pytest.mark.parametrize(
    ("line", "verifier", "expected"),
    [
        ("{", "exact", "train.jsonl:1: is not JSON"),
        ("[1]", "exact", "train.jsonl:1: must be a JSON object, not list"),
        ('{"prompt": "p"}', "exact", "train.jsonl:1: has no field 'answer'"),
        ('{"prompt": "", "answer": "a"}', "exact", "the prompt must be text"),
        ('{"prompt": [{"text": "p"}], "answer": "a"}', "exact", "messages with role and content"),
        ('{"prompt": "p", "answer": null}', "exact", "the answer must be text or a number"),
        ('{"prompt": "p", "answer": "1.5"}', "integer", "needs an integer answer"),
        ('{"prompt": "held out", "answer": "1"}', "exact", "1 held-out prompts also stand in"),
        ("", "exact", "has no rows"),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path: Path, line: str, verifier: str, expected: str) -> None:
    with pytest.raises(DataError, match=expected.replace("[", r"\[")):
        make_dataset(jsonl(tmp_path, line, verifier=verifier), 0)


def test_files_that_are_not_text(tmp_path: Path) -> None:
    config = jsonl(tmp_path, "{}")
    (tmp_path / "train.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="is not UTF-8 text"):
        make_dataset(config, 0)
