"""What travels with a job, and what is refused before anything is sent."""

import os
from pathlib import Path

import pytest
import yaml

from quatro_ray.config import dump_config, load_config
from quatro_ray.config.paths import JobPaths, Paths, paths_of_this_process
from quatro_ray.errors import ConfigError
from quatro_ray.jobs import package
from quatro_ray.jobs.package import pack
from tests.make import config_tree


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory as a user has it: a configuration, data, a reward with a module, and a model."""
    folder = tmp_path / "here"
    (folder / "data").mkdir(parents=True)
    for name in ("a", "b"):
        (folder / f"data/{name}.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    (folder / "rewards.py").write_text("from helpers import one\n\n\ndef score(query, response):\n    return one()\n")
    (folder / "helpers.py").write_text("def one():\n    return 1.0\n")
    (folder / "model").mkdir()
    (folder / "model/config.json").write_text("{}")
    (folder / "job.yaml").write_text(yaml.safe_dump(job(tmp_path / "runs/1")))
    monkeypatch.chdir(folder)
    return folder


def job(run_dir: Path | str) -> dict[str, object]:
    rewards = {"mine": {"kind": "python", "function": "rewards.py:score"}}
    source = {"kind": "jsonl", "path": "data/*.jsonl"}
    return config_tree(
        run_dir,
        rewards=rewards,
        data={"train": {"own": source}, "eval": {"own": source | {"path": "data/a.jsonl"}}},
        model={"kind": "pretrained", "path": "model"},
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "folder"
    path.mkdir()
    return path


def test_relative_files_travel_and_the_configuration_is_valid_where_they_arrive(
    here: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = pack(Path("job.yaml"), ["run.seed=7"], folder, include=[Path("helpers.py")])
    travelled = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert travelled == {
        "config.yaml", "data/a.jsonl", "data/b.jsonl", "helpers.py", "model/config.json", "rewards.py"
    }  # fmt: skip
    assert {str(file) for file in packed.files} == travelled - {"config.yaml"}
    monkeypatch.chdir(folder)
    arrived = load_config(Path("config.yaml"), paths=JobPaths(has_working_dir=True))
    assert arrived.run.seed == 7
    assert dump_config(arrived) == dump_config(packed.config)


def test_a_stopped_job_has_time_for_its_checkpoint(here: Path, folder: Path) -> None:
    packed = pack(Path("job.yaml"), ["checkpoint.grace_s=100"], folder)
    assert int(packed.environment["RAY_JOB_STOP_WAIT_TIME_S"]) > 100


def test_only_named_variables_travel(here: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", "/cache")
    monkeypatch.setenv("OTHER", "not asked for")
    packed = pack(Path("job.yaml"), [], folder, variables=["HF_HOME"])
    assert set(packed.environment) == {"RAY_JOB_STOP_WAIT_TIME_S", "HF_HOME"}


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("HF_TOKEN", "hf_0123456789", "looks like a secret"),
        ("PROXY", "http://user:password@proxy:80", "looks like a secret"),
        ("NOT_SET_ANYWHERE", None, "is not set here"),
    ],
)
def test_secrets_do_not_travel(
    here: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str | None, says: str
) -> None:
    if value is not None:
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=says) as refused:
        pack(Path("job.yaml"), [], folder, variables=[name])
    assert value is None or value not in str(refused.value)


def test_a_relative_run_directory_is_refused(here: Path, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.dir='runs/1': is relative; in a job .* absolute path on storage"):
        pack(Path("job.yaml"), ["run.dir=runs/1"], folder)
    with pytest.raises(ConfigError, match=r"checkpoint\.dir='here': is relative"):
        pack(Path("job.yaml"), ["checkpoint.dir=here"], folder)


def test_what_lies_elsewhere_or_nowhere_is_refused(here: Path, folder: Path) -> None:
    (here.parent / "other.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"\.\./other\.jsonl: only what is in the current directory"):
        pack(Path("job.yaml"), ["data.train.own.path=../other.jsonl"], folder)
    with pytest.raises(ConfigError, match=r"none/\*\.jsonl: does not exist in "):
        pack(Path("job.yaml"), ["data.train.own.path=none/*.jsonl"], folder)
    with pytest.raises(ConfigError, match="missing: does not exist in "):
        pack(Path("job.yaml"), [], folder, include=[Path("missing")])
    (here / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match="gets this name"):
        pack(Path("job.yaml"), [], folder, include=[Path("config.yaml")])


def test_what_is_no_file_is_refused_by_its_name(here: Path, folder: Path) -> None:
    for name, make, message in (
        ("lock", lambda path: path.symlink_to("nobody@nowhere"), "lock: is a link to nothing, and cannot travel"),
        ("pipe", os.mkfifo, "pipe: is neither a file nor a folder, and cannot travel"),
        ("loop", lambda path: path.symlink_to(path.parent), "loop: is a link to a folder that it is in"),
    ):
        (here / name).mkdir()
        make(here / name / name)
        with pytest.raises(ConfigError, match=message):
            pack(Path("job.yaml"), [], folder, include=[Path(name)])


def test_folders_may_be_links(here: Path, folder: Path) -> None:
    (here / "real").mkdir()
    (here / "real/file.py").write_text("x = 1")
    (here / "lib").mkdir()
    for name in ("one", "two"):
        (here / "lib" / name).symlink_to(here / "real")
    pack(Path("job.yaml"), [], folder, include=[Path("lib")])
    assert sorted(path.parent.name for path in (folder / "lib").rglob("file.py")) == ["one", "two"]


def test_absolute_paths_are_the_clusters(here: Path, folder: Path) -> None:
    pack(Path("job.yaml"), ["data.train.own.path=/on/the/cluster/*.jsonl"], folder)
    assert load_config(folder / "config.yaml").model_dump()["data"]["train"]["own"]["path"] == (
        "/on/the/cluster/*.jsonl",
    )


def test_large_files_are_refused_before_they_are_sent(
    here: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package, "_MAX_BYTES", 2**20)
    with (here / "model/weights.safetensors").open("wb") as weights:
        weights.truncate(3 * 2**20)
    with pytest.raises(ConfigError, match=r"the largest is model/weights\.safetensors, 3 MiB.*storage that all nodes"):
        pack(Path("job.yaml"), [], folder)


@pytest.mark.parametrize(
    ("job_config", "kind"),
    [
        (None, Paths),
        ('{"runtime_env": {"working_dir": "gcs://_ray_pkg_1.zip"}, "metadata": {}}', JobPaths),
        ('{"runtime_env": {}, "metadata": {}}', JobPaths),
    ],
)
def test_a_process_knows_whether_it_is_a_job(
    monkeypatch: pytest.MonkeyPatch, job_config: str | None, kind: type[Paths]
) -> None:
    if job_config is not None:
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", job_config)
    assert type(paths_of_this_process()) is kind


def test_a_job_without_a_working_directory_takes_absolute_paths_only(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", '{"runtime_env": {"env_vars": {}}, "metadata": {}}')
    with pytest.raises(ConfigError) as refused:
        load_config(Path("job.yaml"))
    lines = str(refused.value).splitlines()
    assert len(lines) == 5  # the heading, model, function, and the two sources
    assert all("the job has no working directory: submit it with `quatro-ray submit`" in line for line in lines[1:])
