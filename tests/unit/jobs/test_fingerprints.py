"""A resumed run notices changed data and models, and knows those that only moved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quatro_ray.data.registry import make_dataset
from quatro_ray.errors import ConfigError
from quatro_ray.jobs.fingerprints import _BLOCK_BYTES, _MAX_BLOCKS, _of_folder, fingerprints
from quatro_ray.jobs.run_directory import check_run_dir, prepare_run_dir
from quatro_ray.replay.ledger import Ledger
from tests.make import config


def files(folder: Path, *, answer: str = "1", weights: bytes = b"weights") -> Path:
    (folder / "model").mkdir(parents=True, exist_ok=True)
    (folder / "model" / "model.safetensors").write_bytes(weights)
    for part in ("train", "eval"):
        rows = [{"prompt": f"{part} {n}", "answer": answer} for n in range(3)]
        (folder / f"{part}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def start(run_dir: Path, folder: Path) -> bool:
    made = config(
        run_dir,
        run={"dir": str(run_dir), "num_steps": 3, "resume": "auto"},
        model={"kind": "pretrained", "path": str(folder / "model")},
        data={p: {"mine": {"kind": "jsonl", "path": str(folder / f"{p}.jsonl")}} for p in ("train", "eval")},
    )
    inputs = fingerprints(made, make_dataset(made.data, made.rewards))
    check_run_dir(made, inputs)
    resumes = prepare_run_dir(made, inputs)
    (run_dir / "metrics.jsonl").write_text("{}\n")
    Ledger(run_dir / "ledger.sqlite").close()
    return resumes


def test_data_and_model_may_move(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert not start(run_dir, files(tmp_path / "a"))
    assert start(run_dir, tmp_path / "a")
    assert start(run_dir, files(tmp_path / "b"))


@pytest.mark.parametrize(("change", "field"), [({"answer": "2"}, "data.eval.mine"), ({"weights": b"weightz"}, "model")])
@pytest.mark.parametrize("place", ["a", "b"])
def test_their_content_may_not_change(tmp_path: Path, change: dict[str, Any], field: str, place: str) -> None:
    start(tmp_path / "run", files(tmp_path / "a"))
    with pytest.raises(
        ConfigError, match=rf"^{field}: its content differs .*fingerprint \w{{12}} before, \w{{12}} now"
    ):
        start(tmp_path / "run", files(tmp_path / place, **change))


def test_without_fingerprints_both_paths_are_shown(tmp_path: Path) -> None:
    start(tmp_path / "run", files(tmp_path / "a"))
    (tmp_path / "run" / "inputs.json").unlink()
    with pytest.raises(ConfigError, match=r"^model\.path: differs .*\('.*/a/model' before, '.*/b/model' now\)"):
        start(tmp_path / "run", files(tmp_path / "b"))


def test_large_files_are_told_apart_by_both_ends(tmp_path: Path) -> None:
    size = (_MAX_BLOCKS + 8) * _BLOCK_BYTES
    file = tmp_path / "model.safetensors"
    found = set()
    for place in (None, 0, size - 1):
        with file.open("wb") as opened:
            opened.truncate(size)
            if place is not None:
                opened.seek(place)
                opened.write(b"x")
        found.add(_of_folder(tmp_path))
    assert len(found) == 3
