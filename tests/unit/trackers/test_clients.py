"""Each tracker through its real client, without a network: a run, a fall-back, and the run resumed.

Clients other than TensorBoard's are in the extra `trackers` of pyproject.toml; tests of those that are not installed
are skipped.
"""

from __future__ import annotations

import json
import socket
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from benchmarks.faults.disk import Disk
from quatro_ray.telemetry.evaluation_result import EvaluationResult
from tests.unit.trackers.followed import config, events, followed, lines, step

pytestmark = pytest.mark.process
NOT_INSTALLED = "the client is not installed: pip install .[trackers]"
FIRST_PART = [(0, 0.25), (1, 0.1), (2, 0.2), (2, 0.25), (3, 0.3)]
"""Step and value of what `run_twice` records: an evaluation, then rewards."""


def run_twice(made: Any) -> str:
    """Run to step 2, fall back to step 1, and resume at step 2; return the run's id in the tracker."""
    name = made.telemetry.trackers[0]
    with followed(made) as recorder:
        recorder.evaluation(EvaluationResult("sums", 0, 0, 4, 8, {1: 0.25}, 0.5, {}, 3, 0.4, 0.0, 64))
        step(recorder, 1, 0.1)
        step(recorder, 2, 0.2)
        recorder.rewind(1, {0})
        step(recorder, 2, 0.25)
    found = lines_of(made.run.dir / "trackers.json").get(name)
    with followed(made, "failed") as recorder:
        recorder.rewind(2, {0})
        step(recorder, 3, 0.3)
    assert lines_of(made.run.dir / "trackers.json").get(name) == found
    assert events(made.run.dir) == []
    return str(found)


def lines_of(path: Path) -> dict[str, str]:
    return dict(json.loads(path.read_text())) if path.exists() else {}


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made = config(tmp_path / "run", trackers=["tensorboard"])
    run_twice(made)
    shown = EventAccumulator(str(made.run.dir / "tensorboard")).Reload()
    assert [(e.step, round(e.value, 6)) for e in shown.Scalars("reward/mean")] == [(1, 0.1), (2, 0.25), (3, 0.3)]
    assert [(e.step, e.value) for e in shown.Scalars("eval/sums/pass_at_1")] == [(0, 0.25)]
    assert [e.value for e in shown.Scalars("policy/realised_kl_nats_mean")] == [0.5] * 3
    assert not {"policy/realised_kl_nats", "rollout_corr/logprob_abs_diff"} & set(shown.Tags()["scalars"])


@pytest.fixture
def disk(tmp_path: Path) -> Any:
    made = Disk(tmp_path / "disk", 2**20)
    try:
        made.mount()
    except OSError as error:  # who is not root, or is in a container, may not
        pytest.skip(f"no disk to fill: {error}")
    yield made
    made.free()
    made.unmount()


def test_tensorboard_begins_another_file_when_a_full_disk_has_room_again(
    disk: Disk, capsys: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    made = config(disk.path / "run", trackers=["tensorboard"])
    with followed(made) as recorder:
        step(recorder, 1)
        while not list(made.run.dir.glob("tensorboard/*")):  # else many records wait, which then fail in a row
            time.sleep(0.1)
        disk.fill(leave_bytes=0)
        while "tracker tensorboard: failed (why on_step raised OSError" not in capsys.readouterr().out:
            step(recorder, 1)  # what is left of the file's last page takes some
            time.sleep(0.2)
        disk.free()
        step(recorder, 2)
    assert 2 in [e.step for e in EventAccumulator(str(made.run.dir / "tensorboard")).Reload().Scalars("reward/mean")]


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason=NOT_INSTALLED)
    monkeypatch.setenv("WANDB_MODE", "offline")
    made = config(tmp_path / "run", trackers=["wandb"], project="proj", run_name="mine")
    run_id = run_twice(made)
    files = sorted(made.run.dir.glob("wandb/offline-run-*/*.wandb"))  # `wandb sync` makes one run of them
    assert [file.name for file in files] == [f"run-{run_id}.wandb"] * 2
    records = [record for file in files for record in wandb_records(file)]
    assert {(r.run.project, r.run.display_name) for r in records if r.WhichOneof("record_type") == "run"} == {
        ("proj", "mine")
    }
    metrics = {m.glob_name or m.name: m.step_metric for m in (r.metric for r in records) if m.name or m.glob_name}
    assert metrics["*"] == "train/step"
    history = [{i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in r.history.item} for r in records]
    values = [(h["train/step"], h.get("reward/mean", h.get("eval/sums/pass_at_1"))) for h in history if h]
    assert values == FIRST_PART
    exits = [r.exit.exit_code for r in records if r.WhichOneof("record_type") == "exit"]
    assert exits == [0, 1]


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of an offline run, which is a log in LevelDB's format: blocks of 32 KiB, headers of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, body = file.read_bytes(), 7, b""
    while at < len(data):
        if 2**15 - at % 2**15 < 7:  # no room for a header
            at += 2**15 - at % 2**15
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        body += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # the whole record, or its last part
            yield Record.FromString(body)
            body = b""


@pytest.mark.parametrize("store", ["file", "sqlite"])
def test_mlflow(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder, and in a database, which only the full package `mlflow` can write and writes by default."""
    mlflow = pytest.importorskip("mlflow", reason=NOT_INSTALLED)
    if store == "sqlite":
        pytest.importorskip("flask_cors", reason="mlflow-skinny is installed, without stores on the disk")
        pytest.importorskip("sqlalchemy", reason="mlflow-skinny is installed, without stores on the disk")
    uri = f"file://{tmp_path}/mlruns" if store == "file" else f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    made = config(tmp_path / "run", trackers=["mlflow"], project="proj", run_name="mine")
    client = mlflow.MlflowClient()
    run_id = run_twice(made)
    history = client.get_metric_history(run_id, "reward/mean")
    assert [(m.step, m.value) for m in history] == [(s, v) for s, v in FIRST_PART if s]
    assert [(m.step, m.value) for m in client.get_metric_history(run_id, "eval/sums/pass_at_1")] == [(0, 0.25)]
    run = client.get_run(run_id)
    assert (run.info.run_name, run.info.status) == ("mine", "FAILED")
    assert client.get_experiment(run.info.experiment_id).name == "proj"
    assert run.data.params["replay.group_size"] == str(made.replay.group_size)


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio", reason=NOT_INSTALLED)
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    made = config(tmp_path / "run", trackers=["trackio"], project="proj", run_name="mine")
    assert run_twice(made) == "mine"
    with closing(sqlite3.connect(tmp_path / "trackio" / "proj.db")) as database:
        rows = database.execute("SELECT run_id, run_name, step, metrics FROM metrics ORDER BY id").fetchall()
        (settings,) = database.execute("SELECT config FROM configs").fetchone()
    assert len({row[:2] for row in rows}) == 1 and rows[0][1] == "mine"
    found = [(row[2], json.loads(row[3])) for row in rows]
    assert [(s, m.get("reward/mean", m.get("eval/sums/pass_at_1"))) for s, m in found] == FIRST_PART
    assert json.loads(settings)["run"]["dir"] == str(made.run.dir)


def test_swanlab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("swanlab", reason=NOT_INSTALLED)
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.proto.swanlab.run.v1.run_pb2 import RunState
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    monkeypatch.setenv("SWANLAB_MODE", "offline")
    made = config(tmp_path / "run", trackers=["swanlab"], project="proj", run_name="mine")
    run_id = run_twice(made)
    records = []
    for file in sorted(made.run.dir.glob(f"swanlog/run-*-{run_id}/*.swanlab")):
        reader = DataStoreReader()
        reader.open(file)
        records += [Record.FromString(data) for data in iter(reader.scan, None)]
        reader.close()
    assert [(r.start.project, r.start.name, r.start.id) for r in records if r.HasField("start")] == [
        ("proj", "mine", run_id)
    ] * 2
    watched = {"reward/mean", "eval/sums/pass_at_1"}
    values = [(r.scalar.step, r.scalar.value.number) for r in records if r.scalar.key in watched]
    assert values == [(s, v) for s, v in FIRST_PART if (s, v) != (2, 0.25)]  # it keeps the first value of a step
    assert [RunState.Name(r.finish.state) for r in records if r.HasField("finish")] == [
        "RUN_STATE_FINISHED",
        "RUN_STATE_CRASHED",
    ]


def test_a_server_that_never_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It accepts connections and says nothing, so that the client waits; what the client has started ends with it."""
    pytest.importorskip("wandb", reason=NOT_INSTALLED)
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_MODE", "online")
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
        made = config(tmp_path / "run", trackers=["wandb"], tracker_deadline_s=10)
        with followed(made, "failed") as recorder:
            while ("failed", "tracker wandb") not in events(made.run.dir):
                time.sleep(0.1)
            step(recorder, 1)
    assert events(made.run.dir)[-1] == ("incomplete", "tracker wandb")
    assert lines(made.run.dir / "events.jsonl")[-1]["lost_records"] == 1
    assert "0123456789abcdef" not in "".join(f.read_text() for f in made.run.dir.iterdir() if f.is_file())
