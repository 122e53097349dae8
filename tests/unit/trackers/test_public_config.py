"""What trackers learn of the configuration holds no secret."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quatro_ray.config import load_config
from quatro_ray.trackers.public_config import public_config
from tests import make

ROOT = Path(__file__).parents[3]


def test_fields_that_may_hold_secrets_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", "s3cr3t-value")
    made = make.config(
        tmp_path,
        rewards={
            "answer": {"kind": "integer"},
            "judge": {"kind": "http", "urls": ["http://judge:1/s3cr3t"], "token_env": "hf_s3cr3t"},
        },
        generator={
            "max_prompt_tokens": 16,
            "max_response_tokens": 8,
            "engine_args": {"download_dir": "s3cr3t"},
        },
        verifier={"pass_env": ["s3cr3t_NAME"]},
        telemetry={"run_name": "with s3cr3t-value"},
    )
    found = public_config(made)
    assert "s3cr3t" not in json.dumps(found)
    assert found["telemetry"]["run_name"] == "with ***"
    assert found["rewards"]["judge"]["kind"] == "http" and "urls" not in found["rewards"]["judge"]


@pytest.mark.parametrize("name", ["demo.yaml", "qwen2.5-1.5b-8gpu.yaml"])
def test_all_else_is_as_in_the_resolved_configuration(name: str) -> None:
    made = load_config(ROOT / "configs" / name)
    left_out = {"engine_args", "pass_env"}
    assert without(made.model_dump(mode="json"), left_out) == without(public_config(made), left_out)


def without(tree: Any, names: set[str]) -> Any:
    return {k: without(v, names) for k, v in tree.items() if k not in names} if isinstance(tree, dict) else tree
