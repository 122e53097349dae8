"""Files as people have them: compressed, marked, several, with labels; and rows left out, by rule."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quatro_ray.config import DataConfig
from quatro_ray.data.dataset import Dataset
from quatro_ray.data.registry import describe, make_dataset
from quatro_ray.errors import DataError
from tests.unit.rewards.test_workers import reward_configs


def load(path: object, kind: str = "jsonl", reward: str = "exact", bad_rows: str = "refuse", **more: Any) -> Dataset:
    held_out = {"kind": "chain_sum", "num_questions": 8, "seed": 9}
    source = {"kind": kind, "path": path} | more
    tree = {"train": {"mine": source}, "eval": {"held": held_out}, "bad_rows": bad_rows}
    return make_dataset(DataConfig.model_validate(tree), reward_configs(answer={"kind": reward, "only": ["mine"]}))


def lines(*prompts: str) -> bytes:
    return "".join(json.dumps({"prompt": p, "answer": "1"}) + "\n" for p in prompts).encode()


def prompts(dataset: Dataset) -> list[str]:
    return [query.prompt for query in dataset.train["mine"]]


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "a.jsonl": bytes,
    "a.jsonl.gz": gzip.compress,
    "a.jsonl.bz2": bz2.compress,
    "a.jsonl.xz": lzma.compress,
}


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_compressed_files_and_byte_order_marks(tmp_path: Path, name: str, mark: bytes) -> None:
    (tmp_path / name).write_bytes(PACKED[name](mark + lines("a", "b")))
    assert prompts(load(str(tmp_path / name))) == ["a", "b"]


DAMAGED = {"cut": gzip.compress(lines("a"))[:-9], "plain text": lines("a"), "zeros": b"\x1f\x8b\x08\x00" + bytes(20)}


# ids of their own: gzip writes the second into its header, and both workers must collect the same names
@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_archive_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"data\.train\.mine\.path=.*a\.jsonl\.gz: cannot be read \(.+\); correct"):
        load(str(tmp_path / "a.jsonl.gz"))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_patterns_and_lists_of_files(tmp_path: Path, kind: str) -> None:
    import datasets

    for name in ("b", "a", "c"):
        if kind == "jsonl":
            (tmp_path / f"{name}.jsonl").write_bytes(lines(name))
        else:
            datasets.Dataset.from_list([{"prompt": name, "answer": "1"}]).to_parquet(tmp_path / f"{name}.parquet")
    assert prompts(load(str(tmp_path / f"*.{kind}"), kind)) == ["a", "b", "c"]
    listed = [str(tmp_path / f"c.{kind}"), str(tmp_path / f"[ab].{kind}")]
    dataset = load(listed, kind)
    assert prompts(dataset) == ["c", "a", "b"]
    assert [q.query_id for q in dataset.train["mine"]] == ["train.mine:0", "train.mine:1", "train.mine:2"]
    assert prompts(load(listed, kind, max_rows=2)) == ["c", "a"]


def test_a_name_that_looks_like_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "a[1].jsonl").write_bytes(lines("a"))
    assert prompts(load(str(tmp_path / "a[1].jsonl"))) == ["a"]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("nothing*.jsonl", "data.train.mine.path={}/nothing*.jsonl: no file matches; correct the pattern"),
        ("", "is a folder; give its files, such as"),
        ("nowhere.jsonl", "data.train.mine.path={}/nowhere.jsonl: cannot be read (No such file or directory); correct"),
    ],
)
def test_paths_without_a_file(tmp_path: Path, path: str, expected: str) -> None:
    with pytest.raises(DataError) as caught:
        load(str(tmp_path / path))
    assert expected.format(tmp_path) in str(caught.value)


def test_a_file_is_not_read_twice(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines("a"))
    with pytest.raises(DataError, match=r"a\.jsonl is given twice; give it once"):
        load([str(tmp_path / "a.jsonl"), str(tmp_path / "*.jsonl")])


@pytest.mark.parametrize("kind", ["hf", "parquet"])
def test_class_labels_are_their_names(tmp_path: Path, kind: str) -> None:
    import datasets

    features = datasets.Features(
        {"prompt": datasets.Value("string"), "label": datasets.ClassLabel(names=["negative", "positive"])}
    )
    rows = {"prompt": ["a", "b", "c"], "label": [1, 0, None]}
    made = datasets.Dataset.from_dict(rows, features=features)
    path = tmp_path / "labels"
    if kind == "hf":
        made.save_to_disk(path)
    else:
        made.to_parquet(path)
    dataset = load(str(path), kind, bad_rows="skip")
    assert [(q.prompt, q.answer) for q in dataset.train["mine"]] == [("a", "positive"), ("b", "negative")]
    assert dataset.skipped["train.mine"].total() == 1


def test_bad_rows_are_counted_by_rule_with_totals(tmp_path: Path) -> None:
    bad = ["{", "[1]", "[2]", '"x"', *(json.dumps({"prompt": "p", "answer": f"{n}.5"}) for n in range(5))]
    (tmp_path / "a.jsonl").write_bytes("\n".join(bad).encode() + b"\n" + lines("good"))
    dataset = load(str(tmp_path / "a.jsonl"), reward="integer", bad_rows="skip")
    first, *_ = describe(dataset)
    assert first == (
        "data.train.mine: 1 queries; 9 left out: 5 × rewards.answer needs an integer answer; "
        "3 × must be a JSON object; 1 × is not JSON"
    )
