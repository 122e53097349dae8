"""The command line in this process: what it prints where, and its exit status."""

from __future__ import annotations

import errno
import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from quatro_ray import cli
from quatro_ray.config import dump_config
from tests.make import config, own_data_config


@pytest.fixture
def own_data(tmp_path: Path) -> str:
    return str(own_data_config(tmp_path))


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """Runs `quatro-ray` with these arguments; returns the exit status and what went to stdout and stderr."""

    def run(*arguments: str) -> tuple[int | str | None, str, str]:
        monkeypatch.setattr("sys.argv", ["quatro-ray", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return ended.value.code, printed.out, printed.err

    return run


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.train.own.path=/nowhere.jsonl", "/nowhere.jsonl: cannot be read"),
        ("data.train.own.answer_key=label", "train.jsonl:1: has no column 'label'"),
        ("rewards.answer.kind=integer", "train.jsonl:1: rewards.answer needs an integer answer, not 'a'"),
        ("model={kind: pretrained, path: /nowhere}", "model.path=/nowhere: cannot be loaded"),
        ("generator.max_prompt_tokens=3", "its prompt has 6 tokens"),
        ("run.dir=/etc", "run.dir=/etc: is not empty"),
    ],
)
def test_what_a_user_can_get_wrong_is_one_line(call, own_data: str, override: str, expected: str) -> None:  # type: ignore[no-untyped-def]
    code, out, err = call("train", own_data, override)
    # a busy machine may say what it waits for
    assert code == 2 and not [line for line in out.splitlines() if not line.startswith("waiting for ")]
    assert err.startswith("error: ") and expected in err
    assert "Traceback" not in err


def test_plan_and_validate_start_nothing(call, own_data: str) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = call("plan", own_data, "generator.num_engines=2")
    assert code == 0
    assert "2 × generator" in out and "4 queries × 4 rollouts = 16 rollouts a step" in out
    assert "at most 64 responses in an engine, which decodes 16 at the same time" in out and "advice" not in out
    code, out, _ = call("plan", own_data, "generator.max_groups_in_flight=7")
    assert code == 0 and "with generator.max_groups_in_flight=8 something always waits" in out
    code, out, _ = call("validate", own_data)
    assert code == 0
    assert yaml.safe_load(out)["objective"]["kind"] == "grpo"
    assert re.search(r"^# .*own", out, re.MULTILINE)


def test_validate_reads_the_data(call, own_data: str) -> None:  # type: ignore[no-untyped-def]
    code, _, err = call("validate", own_data, "data.eval.own.answer_key=label")
    assert code == 2 and "eval.jsonl:1: has no column 'label'" in err


def test_fields_of_one_section_and_of_none(call) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = call("fields", "replay")
    assert code == 0
    assert "max_staleness" in out and "learning_rate" not in out
    assert "learning_rate" in call("fields")[1]
    code, _, err = call("fields", "nonsense")
    assert code == 2
    assert "nonsense: no such section; `quatro-ray fields` lists all" in err


def test_tasks_are_those_of_reasoning_gym(call) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = call("tasks")
    assert code == 0
    assert "chain_sum" in out.splitlines() == sorted(out.splitlines())


def test_a_report_needs_a_run(call, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    code, _, err = call("report", str(tmp_path))
    assert code == 2
    assert err == f"error: {tmp_path}: holds no run, as it has no config.yaml; give the run.dir of a run\n"


def test_a_run_that_is_not_finished_has_a_report(call, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "config.yaml").write_text("run: {num_steps: 9}\n")
    code, out, _ = call("report", str(tmp_path))
    assert (code, out) == (0, f"report: {tmp_path / 'report.html'}\n")
    assert "step 0 of 9" in (tmp_path / "report.html").read_text()


def test_watching_a_report_ends_with_its_run_or_with_ctrl_c(call, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Both without a traceback and with status 0."""
    (tmp_path / "config.yaml").write_text("run: {num_steps: 9}\n")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("quatro_ray.telemetry.report.watch_report", interrupt)
        code, _, err = call("report", str(tmp_path), "--watch")
    assert (code, err) == (0, "")
    (tmp_path / "summary.json").write_text("{}")
    code, out, _ = call("report", str(tmp_path), "--watch", "--every", "1")
    assert (code, out) == (0, f"report: {tmp_path / 'report.html'}\n")


@pytest.mark.parametrize("command", ["status", "audit", "trace"])
def test_what_is_no_run_is_told_in_one_line(call, tmp_path: Path, command: str) -> None:  # type: ignore[no-untyped-def]
    code, out, err = call(command, str(tmp_path))
    assert (code, out) == (2, "")
    assert err == f"error: {tmp_path}: holds no run, as it has no config.yaml; give the run.dir of a run\n"


def test_a_status_is_text_or_json(call, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "config.yaml").write_text("run: {num_steps: 9}\n")
    code, out, err = call("status", str(tmp_path))
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == f"run           {tmp_path}: ended, no record yet"
    code, out, _ = call("status", str(tmp_path), "--json")
    assert code == 0 and json.loads(out)["num_steps"] == 9
    code, again, _ = call("status", str(tmp_path), "--watch", "--every", "1")  # there is nothing to wait for
    assert code == 0 and again.splitlines()[1] == "step          0 of 9, version unknown"


def test_watching_a_status_ends_with_ctrl_c(call, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "config.yaml").write_text("run: {num_steps: 9}\n")

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("quatro_ray.jobs.status_view.show_status", interrupt)
    assert call("status", str(tmp_path), "--watch") == (0, "", "")


def test_an_audit_tells_by_its_status_if_anything_is_lost(call, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "config.yaml").write_text(dump_config(config(tmp_path)))
    code, out, err = call("audit", str(tmp_path))
    assert (code, err) == (0, "")
    assert out.startswith(f"{tmp_path}: not finished, step 0 of 3") and out.endswith("inconsistent\n")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')  # and no ledger
    code, out, err = call("audit", str(tmp_path), "--json", "--deep")
    assert (code, err) == (1, "")
    assert json.loads(out)["findings"] == {"ledger": ["ledger.sqlite is missing or empty, and metrics.jsonl has steps"]}
    (tmp_path / "config.yaml").write_text("run: {num_steps: 9}\n")
    code, out, err = call("audit", str(tmp_path))
    assert (code, out) == (2, "") and "replay.groups_per_step must be a whole number" in err


def test_looking_at_a_run_loads_neither_torch_nor_ray(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(config(tmp_path)))
    code = (
        "import sys\nfrom quatro_ray import cli\n"
        "for command in ('status', 'audit'):\n"
        f"    sys.argv = ['quatro-ray', command, {str(tmp_path)!r}]\n"
        "    try: cli.main()\n    except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'ray', 'vllm', 'deepspeed', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL, timeout=120)


def test_a_trace_is_written_beside_the_run_or_where_one_says(call, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "config.yaml").write_text("run: {num_steps: 9}\n")
    assert call("trace", str(tmp_path)) == (0, f"trace: {tmp_path / 'trace.json'}\n", "")
    out = tmp_path / "nowhere" / "t.json"
    assert call("trace", str(tmp_path), "--out", str(out))[::2] == (
        2, f"error: {out}: cannot be written: No such file or directory; give another path with --out\n"
    )  # fmt: skip


def test_a_step_that_a_run_does_not_have_is_not_made_again(call, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "config.yaml").write_text(dump_config(config(tmp_path)))
    (tmp_path / "ledger.sqlite").touch()
    error = f"error: STEP={{}}: {tmp_path}/metrics.jsonl has no such step; {{}}\n"
    assert call("replay", str(tmp_path), "-1") == (2, "", error.format(-1, "it has none yet; choose another run"))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    for step in (-1, 0, 3):
        assert call("replay", str(tmp_path), str(step)) == (2, "", error.format(step, "choose one from 1 to 2"))
    assert "--verbos" in call("replay", str(tmp_path), "1", "--verbos")[2]


def test_the_version_is_that_of_the_installed_package(call) -> None:  # type: ignore[no-untyped-def]
    code, out, _ = call("--version")
    assert (code, out) == (0, f"quatro-ray {version('quatro_ray')}\n")


def test_an_option_that_is_unknown_is_a_usage_error(call) -> None:  # type: ignore[no-untyped-def]
    code, _, err = call("train", "x.yaml", "--nonsense")
    assert code == 2 and "--nonsense" in err


def test_being_told_to_end_has_a_status_of_its_own(call, own_data: str, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    from quatro_ray.errors import Preempted

    def end(*_: object) -> None:
        raise Preempted("a checkpoint of step 3 is written")

    monkeypatch.setattr(cli, "load_config", end)
    code, out, err = call("train", own_data)
    assert (code, out, err) == (143, "", "ended: a checkpoint of step 3 is written\n")


@pytest.mark.parametrize(
    ("command", "function"),
    [
        ("status", "jobs.status_view.show_status"),
        ("audit", "jobs.audit.audit_run"),
        ("report", "telemetry.report.write_report"),
        ("trace", "telemetry.chrome_trace.write_trace"),
    ],
)
def test_files_of_another_user_are_one_line(call, monkeypatch, command: str, function: str) -> None:  # type: ignore[no-untyped-def]
    """Root, which may run the tests, can read everything, so the error is raised here."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/run/events.jsonl")

    monkeypatch.setattr(f"quatro_ray.{function}", refuse)
    status, _, shown = call(command, "/run")
    assert status == 2
    assert shown == (
        "error: /run/events.jsonl: permission denied; the files of a run are for its owner: use that account, or "
        "allow yours\n"
    )
