"""Queries from files, Hugging Face datasets and generators; bad rows, mixing, order, filters."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import yaml

from quatro_ray.config import Config, DataConfig, FilterConfig, RewardConfig
from quatro_ray.data.chat_template import encode_prompt
from quatro_ray.data.dataset import Dataset, QueryStream
from quatro_ray.data.prompt_lengths import fit_prompts
from quatro_ray.data.registry import describe, make_dataset
from quatro_ray.engines.tiny_tokenizer import make_tokenizer
from quatro_ray.errors import ConfigError, DataError, SeveralErrors
from quatro_ray.orchestrator.group_filters import why_not
from quatro_ray.rewards.registry import make_reward
from quatro_ray.types import DropReason, Query, Response
from tests.make import config
from tests.unit.rewards.test_workers import reward_configs

HELD_OUT = {"kind": "chain_sum", "num_questions": 8, "seed": 9}


def load(source: dict[str, Any], *, bad_rows: str = "refuse", reward: str = "exact", **more: Any) -> Dataset:
    held_out = more.pop("eval", {"held": HELD_OUT})
    config = DataConfig.model_validate({"train": {"mine": source}, "eval": held_out, "bad_rows": bad_rows})
    rewards: dict[str, RewardConfig] = reward_configs(answer={"kind": reward, "only": ["mine"]})
    return make_dataset(config, rewards)


def jsonl(tmp_path: Path, *rows: Any, **settings: Any) -> dict[str, Any]:
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return {"kind": "jsonl", "path": str(path), **settings}


def test_json_lines(tmp_path: Path) -> None:
    messages = [{"content": "two?", "role": "user", "name": "x"}]
    rows = [{"prompt": "1+1=", "answer": 2, "extra": 0}, "", {"prompt": messages, "answer": " b "}]
    first, second = load(jsonl(tmp_path, *rows)).train["mine"]
    assert first == Query("train.mine:0", "1+1=", "2", {"extra": 0}, source="mine")
    assert second.answer == "b"

    class Tokenizer:
        def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> Any:
            assert options.keys() == {"add_generation_prompt", "return_dict"}
            return [conversation, options["add_generation_prompt"]]

        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[Any]:
            return [text]

    assert encode_prompt(Tokenizer(), second.prompt) == [[{"role": "user", "content": "two?"}], True]
    assert encode_prompt(Tokenizer(), first.prompt) == ["1+1="]


ROWS: list[dict[str, Any]] = [
    # what verl, TRL, OpenRLHF, GSM8K and MATH look like
    {"prompt": [{"role": "user", "content": "q"}], "reward_model": {"style": "rule", "ground_truth": "7"}},
    {"prompt": "q", "ground_truth": "7"},
    {"input": "q", "label": "7"},
    {"question": "q", "answer": "7"},
    {"problem": "q", "solution": "7", "level": "3"},
]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hf", "hf_splits", "hf_repository"])
@pytest.mark.parametrize("row", ROWS, ids=[" ".join(r) for r in ROWS])
def test_columns_that_people_have_are_found(tmp_path: Path, kind: str, row: dict[str, Any]) -> None:
    import datasets

    path = tmp_path / "data"
    made = datasets.Dataset.from_list([row])
    settings: dict[str, Any] = {"kind": kind.partition("_")[0], "path": str(path)}
    if kind == "jsonl":
        path.write_text(json.dumps(row))
    elif kind == "parquet":
        made.to_parquet(path)
    elif kind == "hf":
        made.save_to_disk(path)
    elif kind == "hf_splits":
        datasets.DatasetDict({"train": made, "test": made}).save_to_disk(path)
        settings["split"] = "test"
    else:  # a copy of a hub repository: data files in a folder
        path.mkdir()
        made.to_parquet(path / "train.parquet")
        settings["split"] = "train"
    (query,) = load(settings).train["mine"]
    chat = json.dumps([{"role": "user", "content": "q"}])
    assert (query.prompt, query.answer) == (chat if isinstance(row.get("prompt"), list) else "q", "7")


def test_columns_are_mapped_and_prompts_built(tmp_path: Path) -> None:
    row = {"q": "What is {x}?", "meta": {"a": "so #### 7"}, "hint": "think"}
    keys = {"prompt_key": "q", "answer_key": "meta.a", "answer_extract": "hashes"}
    (plain,) = load(jsonl(tmp_path, row, **keys, prompt_template="{hint}: {prompt} {other}")).train["mine"]
    assert (plain.prompt, plain.answer) == ("think: What is {x}? {other}", "7")
    (chat,) = load(jsonl(tmp_path, row, **keys, system_prompt="Be brief.")).train["mine"]
    assert json.loads(chat.prompt) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is {x}?"},
    ]
    assert len(load(jsonl(tmp_path, row, row | {"q": "b"}, **keys, max_rows=1)).train["mine"]) == 1


BAD_ROWS = [
    ("{", "exact", "is not JSON"),
    ("[" * 100_000, "exact", "is nested too deeply"),
    ("[1]", "exact", "must be a JSON object, not list"),
    ('{"prompt": "p"}', "exact", "has none of the columns answer, "),
    ('{"prompt": "", "answer": "a"}', "exact", "the prompt must be text"),
    ('{"prompt": [{"text": "p"}], "answer": "a"}', "exact", "messages with role and content"),
    ('{"prompt": "p", "answer": null}', "exact", "the answer must be text, a number or test cases, not NoneType"),
    ('{"prompt": "p", "answer": NaN}', "exact", "the answer is missing (empty, or not a number)"),
    ('{"prompt": "p", "answer": ""}', "exact", "the answer is missing"),
    ('{"prompt": "p", "answer": ' + "9" * 5000 + "}", "exact", "cannot be read (Exceeds the limit"),
    ('{"prompt": "a \\ud800", "answer": "a"}', "exact", "contains a lone surrogate"),
    ('{"prompt": "[{\\"role\\" is no JSON", "answer": "a"}', "exact", "the prompt is the JSON text of chat messages"),
    (
        '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "answer": "a"}',
        "exact",
        "the last message is the assistant's",
    ),
    ('{"prompt": "p", "answer": "1.5"}', "integer", "rewards.answer needs an integer answer, not '1.5'"),
    ('{"prompt": "p", "answer": "$$"}', "math", "math-verify cannot read the answer"),
    ('{"prompt": "p", "answer": "a"}', "reasoning_gym", "needs a query that a reasoning_gym source made"),
]


@pytest.mark.parametrize(("line", "reward", "expected"), BAD_ROWS, ids=[b[2][:30] for b in BAD_ROWS])
def test_a_bad_row_ends_it_or_is_counted(tmp_path: Path, line: str, reward: str, expected: str) -> None:
    good = {"prompt": "good", "answer": "1"}
    source = jsonl(tmp_path, good, line)
    with pytest.raises(DataError) as caught:
        load(source, reward=reward)
    assert expected in str(caught.value)
    assert "data.bad_rows: skip" in str(caught.value)
    assert f"train.jsonl:{1 if reward == 'reasoning_gym' else 2}: " in str(caught.value)
    if reward == "reasoning_gym":
        return  # the good row is as bad there
    dataset = load(source, reward=reward, bad_rows="skip")
    assert [q.prompt for q in dataset.train["mine"]] == ["good"]
    ((reason, count),) = (+dataset.skipped["train.mine"]).items()
    assert reason in str(caught.value) and count == 1
    assert any("1 left out: " in line for line in describe(dataset))


def test_held_out_prompts_are_not_trained_on(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2"}]
    train = jsonl(tmp_path, *rows)
    (tmp_path / "eval.jsonl").write_text(json.dumps(rows[1]))
    held_out = {"held": {"kind": "jsonl", "path": str(tmp_path / "eval.jsonl")}}
    with pytest.raises(DataError, match=r"1 prompts are also in data.eval \(first: .*train.jsonl:2, 'b'\)"):
        load(train, eval=held_out)
    dataset = load(train, eval=held_out, bad_rows="skip")
    assert [q.prompt for q in dataset.train["mine"]] == ["a"]
    assert dataset.skipped["train.mine"] == {"it is held out": 1}
    with pytest.raises(DataError, match="no query is left"):
        load(jsonl(tmp_path, rows[1]), eval=held_out, bad_rows="skip")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"kind": "jsonl", "path": "/nowhere.jsonl"}, "/nowhere.jsonl: cannot be read"),
        ({"kind": "parquet", "path": "/nowhere.parquet"}, "/nowhere.parquet: cannot be read as Parquet"),
        ({"kind": "parquet", "path": __file__}, "cannot be read as Parquet"),
        ({"kind": "hf", "path": str(Path(__file__).parent)}, "cannot be loaded"),
    ],
)
def test_files_that_cannot_be_read(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(DataError, match=expected):
        load(settings)


def test_text_that_is_none_and_files_without_rows(tmp_path: Path) -> None:
    source = jsonl(tmp_path, "")
    with pytest.raises(DataError, match=r"has no row that can be used \(it is empty\)"):
        load(source)
    Path(source["path"]).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="is not UTF-8 text"):
        load(source)


def test_a_split_must_be_named(tmp_path: Path) -> None:
    import datasets

    datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS[1:2])}).save_to_disk(tmp_path / "d")
    with pytest.raises(DataError, match=r"has splits \['test'\], not None; set its split"):
        load({"kind": "hf", "path": str(tmp_path / "d")})


def test_chain_sums_are_distinct_right_and_a_function_of_the_seed() -> None:
    source = {"kind": "chain_sum", "num_questions": 500, "max_terms": 3}
    queries = load(source).train["mine"]
    prompts = [q.prompt for q in queries]
    assert len(prompts) == len(set(prompts)) and 490 <= len(prompts) <= 500
    for query in queries:
        terms = query.prompt.removesuffix("=").replace("-", "+-").split("+")
        assert sum(map(int, terms)) == int(query.answer)
    assert load(source).train["mine"] == queries != load(source | {"seed": 2}).train["mine"]
    with pytest.raises(ConfigError, match="gave only"):
        load({"kind": "chain_sum", "max_digits": 1, "num_questions": 5000})


def test_reasoning_gym_by_name_and_parameters() -> None:
    source = {
        "kind": "reasoning_gym",
        "task": "leg_counting",
        "size": 30,
        "params": {"min_animals": 1, "max_animals": 2},
        "seed": 1,
    }
    dataset = load(source, reward="reasoning_gym")
    queries = dataset.train["mine"]
    left_out = dataset.skipped["train.mine"].total()
    assert len(queries) + left_out == 30
    assert len({q.prompt for q in queries}) == len(queries)
    assert json.loads(queries[0].metadata["reasoning_gym"])["task"] == "leg_counting"
    (chat, *_) = load(source | {"as_chat": True}, reward="reasoning_gym").train["mine"]
    assert json.loads(chat.prompt)[0]["role"] == "user"
    with pytest.raises(ConfigError, match="has no such task"):
        load(source | {"task": "counting_sheep"})
    with pytest.raises(ConfigError, match="leg_counting refuses them"):
        load(source | {"params": {"max_sheep": 2}})


def stream(seed: int = 0, shuffle: bool = True, **sizes: float) -> QueryStream:
    train = {n: [Query(f"{n}{i}", "p", "a", source=n) for i in range(10)] for n in sizes}
    return QueryStream(Dataset(train, sizes, {}, {}), seed, shuffle=shuffle)


def test_every_query_comes_once_an_epoch_each_in_its_own_order() -> None:
    ids = [q.query_id for q in islice(stream(a=1), 30)]
    epochs = [ids[0:10], ids[10:20], ids[20:30]]
    assert all(sorted(e) == sorted(epochs[0]) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert ids == [q.query_id for q in islice(stream(a=1), 30)] != [q.query_id for q in islice(stream(1, a=1), 30)]
    in_order = [q.query_id for q in islice(stream(shuffle=False, a=1), 20)]
    assert in_order == [f"a{i}" for i in range(10)] * 2


def test_sources_are_drawn_by_weight() -> None:
    drawn = Counter(q.source for q in islice(stream(a=1, b=3), 4000))
    assert 0.22 < drawn["a"] / 4000 < 0.28


@pytest.mark.parametrize("at", [0, 1, 9, 10, 37])
def test_the_stream_resumes_exactly(at: int) -> None:
    whole = [q.query_id for q in islice(stream(a=1, b=2), 100)]
    first = stream(a=1, b=2)
    before = [q.query_id for q in islice(first, at)]
    again = stream(a=1, b=2)
    again.restore(json.loads(json.dumps(first.state())))
    assert before + [q.query_id for q in islice(again, 100 - at)] == whole
    with pytest.raises(ValueError, match=r"the data has sources \['a'\], the saved position \['a', 'b'\]"):
        stream(a=1).restore(first.state())


@pytest.mark.parametrize(
    ("filters", "rewards", "truncated", "reason"),
    [
        ({}, [1, 1], 2, None),
        ({"drop_zero_variance": True}, [1, 1], 0, DropReason.ZERO_VARIANCE),
        ({"drop_zero_variance": True}, [1, 0], 0, None),
        ({"min_mean_reward": 0.3}, [1, 0, 0, 0], 0, DropReason.TOO_HARD),
        ({"min_mean_reward": 0.25}, [1, 0, 0, 0], 0, None),
        ({"max_mean_reward": 0.5}, [1, 1, 0], 0, DropReason.TOO_EASY),
        ({"max_truncated_share": 0.5}, [1, 0], 1, None),
        ({"max_truncated_share": 0.5}, [1, 0], 2, DropReason.OVERLONG),
    ],
)
def test_filters(filters: dict[str, Any], rewards: list[float], truncated: int, reason: DropReason | None) -> None:
    assert why_not(FilterConfig(**filters), rewards, truncated) == reason


BENCHMARK_ROWS = {
    "HuggingFaceH4/MATH-500": {
        "problem": "q",
        "solution": "so \\boxed{7}",
        "answer": "7",
        "level": 1,
        "unique_id": "a",
    },
    "HuggingFaceH4/aime_2024": {"id": 60, "problem": "q", "solution": "thus 7", "answer": "7", "year": "2024"},
    "MathArena/aime_2025": {"problem_idx": 1, "problem": "q", "answer": 7, "problem_type": ["Algebra"]},
    "AI-MO/aimo-validation-amc": {"id": 0, "problem": "q", "answer": 7.0, "url": "u"},
    "math-ai/minervamath": {"question": "q", "answer": "7"},
    "Hothan/OlympiadBench": {"id": 1, "question": "q", "solution": ["thus 7"], "final_answer": ["$7$"], "unit": None},
    "openai/gsm8k": {"question": "q", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"},
}


@pytest.mark.parametrize("name", sorted(yaml.safe_load(Path("configs/eval/math.yaml").read_text())))
def test_benchmarks_load_from_local_copies(tmp_path: Path, name: str) -> None:
    """Rows of the published format; the hub is not asked."""
    import datasets

    source = yaml.safe_load(Path("configs/eval/math.yaml").read_text())[name]
    made = datasets.Dataset.from_list([BENCHMARK_ROWS[source["path"]]] * 2)
    datasets.DatasetDict({source["split"]: made}).save_to_disk(tmp_path / "copy")
    (query, _) = load(source | {"path": str(tmp_path / "copy")}, reward="math").train["mine"]
    assert json.loads(query.prompt)[-1] == {"role": "user", "content": "q"}
    (reward,) = [make_reward(part) for part in reward_configs(answer={"kind": "math"}).values()]
    assert reward(query, Response(r"therefore \boxed{7}", 3, truncated=False)) == 1


def test_a_column_of_the_template_that_is_empty_in_a_row(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "answer": "a", "context": "c"}, {"prompt": "q", "answer": "a", "context": None}]
    source = jsonl(tmp_path, *rows, prompt_template="{context} {prompt}")
    with pytest.raises(DataError, match="prompt_template uses the column 'context', which has no text or number here"):
        load(source)
    assert [q.prompt for q in load(source, bad_rows="skip").train["mine"]] == ["c q"]


def test_test_cases_for_a_server_are_checked_too(tmp_path: Path) -> None:
    made = DataConfig.model_validate(
        {"train": {"mine": jsonl(tmp_path, {"prompt": "p", "answer": "no"})}, "eval": {"held": HELD_OUT}}
    )
    rewards = reward_configs(answer={"kind": "sandbox_fusion", "urls": ["http://127.0.0.1:1"], "only": ["mine"]})
    with pytest.raises(DataError, match=r"train.jsonl:1: rewards.answer .*test cases"):
        make_dataset(made, rewards)


def test_what_is_held_out_is_not_imitated_either(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "answer": "a"} for i in range(200)]
    (tmp_path / "warm.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"prompt": "h", "answer": "a"}])))
    (tmp_path / "held.jsonl").write_text(json.dumps({"prompt": "h", "answer": "a"}))
    tree = {
        "train": {"mine": jsonl(tmp_path, {"prompt": "p", "answer": "a"})},
        "eval": {"held": {"kind": "jsonl", "path": str(tmp_path / "held.jsonl")}},
        "warmup": {"kind": "jsonl", "path": str(tmp_path / "warm.jsonl")},
    }
    with pytest.raises(DataError, match=r"data.warmup: 1 prompts are also in data.eval"):
        make_dataset(DataConfig.model_validate(tree), reward_configs(answer={"kind": "exact"}))
    dataset = make_dataset(
        DataConfig.model_validate(tree | {"bad_rows": "skip"}), reward_configs(answer={"kind": "exact"})
    )
    assert [len(part) for part in dataset.warmup] == [72, 128]
    assert "data.warmup: 200 queries; 1 left out: it is held out" in describe(dataset)


def test_prompts_that_do_not_fit_end_it_or_are_counted(tmp_path: Path) -> None:
    class Letters:
        def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> Any:
            raise AssertionError("no prompt is a chat")

        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[Any]:
            return list(text)

    rows = [{"prompt": "short", "answer": "1"}, {"prompt": "much longer", "answer": "1"}]
    dataset = load(jsonl(tmp_path, *rows))
    with pytest.raises(DataError, match=r"train.mine:1: its prompt has 11 tokens, .*max_prompt_tokens=7 allows 1 to 7"):
        fit_prompts(dataset, Letters(), with_limit(7))
    fitting = fit_prompts(dataset, Letters(), with_limit(7, bad_rows="skip"))
    assert [q.prompt for q in fitting.train["mine"]] == ["short"]
    assert list((+fitting.skipped["train.mine"]).values()) == [1]
    assert not +dataset.skipped["train.mine"]
    with pytest.raises(DataError, match=r"data.train.mine: no query is left"):
        fit_prompts(dataset, Letters(), with_limit(3, bad_rows="skip"))


def with_limit(max_prompt_tokens: int, bad_rows: str = "refuse") -> Config:
    made = config(generator={"max_prompt_tokens": max_prompt_tokens})
    return made.model_copy(update={"data": made.data.model_copy(update={"bad_rows": bad_rows})})


def test_a_chat_that_the_tokenizer_cannot_show_is_refused(tmp_path: Path) -> None:
    dataset = load(jsonl(tmp_path, {"prompt": "1+1?", "answer": "2"}) | {"as_chat": True})
    tokenizer = make_tokenizer()
    with pytest.raises(DataError, match=r"train.mine:0: its chat cannot be rendered for the model \(.*chat_template"):
        fit_prompts(dataset, tokenizer, with_limit(50))
    tokenizer.chat_template = "{{ raise_exception('no system messages') }}"
    with pytest.raises(DataError, match="the chat template refuses its messages: no system messages"):
        fit_prompts(dataset, tokenizer, with_limit(50))


def test_every_source_that_cannot_be_used_is_told() -> None:
    missing = {"kind": "jsonl", "path": "/nowhere/a.jsonl"}
    tree = {
        "train": {"a": missing, "b": missing | {"path": "/nowhere/b.jsonl"}},
        "eval": {"c": {"kind": "train_share", "source": "a", "share": 0.5}},
    }
    with pytest.raises(SeveralErrors) as caught:
        make_dataset(DataConfig.model_validate(tree), reward_configs(answer={"kind": "exact"}))
    assert len(caught.value.errors) == 2
    assert str(caught.value).splitlines()[0] == "2 problems"
    assert [
        f"/nowhere/{name}.jsonl" in line for name, line in zip("ab", str(caught.value).splitlines()[1:], strict=True)
    ] == [True, True]
