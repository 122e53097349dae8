"""The configuration: strict, clear about what is wrong, importable without the heavy libraries."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from quatro_ray.config import Config, dump_config, load_config
from quatro_ray.errors import ConfigError
from quatro_ray.reference import describe_fields
from tests.make import config, config_tree

ROOT = Path(__file__).parents[2]


def write(tmp_path: Path, tree: object) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


SHIPPED = sorted([*(ROOT / "configs").glob("*.yaml"), *(ROOT / "examples").rglob("*.yaml")])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_shipped_configs_are_valid(path: Path) -> None:
    load_config(path)


def test_dump_and_load_are_inverse(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, config_tree()))
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, config_tree())
    config = load_config(path, ["learner.learning_rate=1e-4", "objective={kind: grpo}", "verifier.num_workers=3"])
    assert config.learner.learning_rate == 1e-4
    assert config.objective.kind == "grpo"
    assert config.verifier.num_workers == 3


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("learner.lr=1", "learner.lr: unknown field"),
        ("nonsense.x=1", "nonsense: unknown field"),
        ("learner.learning_rate=-1", "learner.learning_rate=-1: Input should be greater than 0"),
        ("learner.learning_rate=fast", "learner.learning_rate='fast'"),
        ("learner.tokens_per_micro_batch=20", "must hold the longest rollout"),
        ("learner.num_ranks=99", "every rank needs one"),
        ("objective={kind: ppo}", "'quatro', 'grpo'"),
        ("objective={kind: quatro, importance: {truncation: 0.5}}", "truncation=0.5"),
        ("weight_sync.backend=nccl", "weight_sync.backend=nccl needs cluster.device=cuda"),
        ("learner.attn_implementation=flash_attention_2", "needs cluster.device=cuda"),
        ("learner.num_warmup_steps=3", "the learning rate would never be reached"),
        ("generator.engine_args={seed: 3}", "engine_args may not contain ['seed']"),
        (
            "generator={deterministic: true, num_engines: 2, max_prompt_tokens: 4, max_response_tokens: 4}",
            "num_engines=1",
        ),
        ("model={kind: tiny, hidden_size: 48}", "multiple of 32*num_heads"),
        ("data.train.sums.min_terms=5", "min_terms=5 must be at most max_terms=2"),
        ("data.train={}", "at least 1 item"),
        ("data.train.sums.kind=csv", "'jsonl', 'parquet', 'hf', 'reasoning_gym', 'chain_sum'"),
        ("data.train.f={kind: jsonl, path: x, prompt_template: hello}", "must contain {prompt}"),
        ("rewards={}", "at least 1 item"),
        ("rewards.answer.kind=guess", "'integer', 'exact', 'math'"),
        ("rewards.answer.only=[other]", "no source has that name; there are ['sums']"),
        ("rewards={a: {kind: exact, only: []}}", "no part judges the source 'sums'"),
        ("rewards.shape={kind: regex, pattern: '('}", "must be a regular expression"),
        ("rewards.short={kind: length, max_tokens: 5, buffer_tokens: 6}", "must be at most max_tokens=5"),
        ("rewards.mine={kind: python, function: foo}", "must have the form module:name"),
        ("rewards.mine={kind: python, function: 'nowhere/x.py:f'}", "there is no file nowhere/x.py"),
        ("rewards.far={kind: http, urls: ['ftp://x']}", "must be http://host"),
        ("rewards.far={kind: http, urls: ['http://me:secret@x']}", "without user or password"),
        ("filters={min_mean_reward: 0.8, max_mean_reward: 0.2}", "must be below max_mean_reward=0.2"),
        ("evaluation.pass_at=[1, 16]", "no k above samples_per_query=8"),
        ("evaluation.pass_at=[2]", "must hold 1"),
        ("learner", "must have the form section.field=value"),
        ("run.seed.x=1", "is a value, not a section"),
        ("run.seed={", "override 'run.seed={': is not YAML (while parsing"),
        ("run.dir=2024-13-45", "month must be in 1..12"),
        ("model={kind: tiny, kind: tiny}", "'kind' stands twice in one mapping"),
        ("run.seed=5000000000", "should be less than 4294967296"),
        ("objective={kind: quatro, kl_budget_nats: -1}", "objective.kl_budget_nats=-1: Input should be"),
        ("objective={kind: quatro, max_eta: .inf}", "objective.max_eta=inf: Input should be a finite number"),
        ("verifier.exhausted_reward=.nan", "should be a finite number"),
        ("generator.top_p=0.9", "generator.top_p: 0.9 must be 1"),
        ("generator.temperature=3", "should be less than or equal to 2"),
        ("evaluation.temperature=0", "set samples_per_query to 1 instead of 8, and pass_at to [1]"),
        ("generator.engine_args={hf_token: x}", "a token belongs into the environment"),
        ("rewards.far={kind: http, urls: ['http://x'], token_env: sk-a1}", "is no name of an environment variable"),
        ("rewards.far={kind: sandbox_fusion, urls: ['http://x'], timeout_s: 8}", "must exceed limits.wall_s=8"),
        ("data.eval=@/nowhere.yaml", "the file cannot be read"),
    ],
)
def test_bad_values_give_one_clear_error(tmp_path: Path, override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, config_tree()), [override])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "mode", "expected"),
    [
        ("dr_grpo", "seq_mean_token_mean", "the bias that dr_grpo removes"),
        ("dr_grpo", "token_mean", "the bias that dr_grpo removes"),
        ("gspo", "token_mean", "weights responses by their length"),
    ],
)
def test_normalisations_that_undo_a_method_are_refused(tmp_path: Path, kind: str, mode: str, expected: str) -> None:
    overrides = [f"objective={{kind: {kind}}}", f"learner.loss_agg_mode={mode}"]
    with pytest.raises(ConfigError, match=expected):
        load_config(write(tmp_path, config_tree()), overrides)
    assert load_config(write(tmp_path, config_tree()), overrides[:1]).learner.loss_agg_mode is None


def test_missing_section(tmp_path: Path) -> None:
    tree = config_tree()
    del tree["learner"]
    with pytest.raises(ConfigError, match="learner: required field is missing"):
        load_config(write(tmp_path, tree))


@pytest.mark.parametrize(
    ("text", "expected"), [("a: [", "is not YAML"), ("- 1", "must be a mapping"), (None, "cannot be read")]
)
def test_unusable_files(tmp_path: Path, text: str | None, expected: str) -> None:
    path = tmp_path / "c.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=expected):
        load_config(path)


@pytest.mark.process
def test_import_is_light() -> None:
    heavy = "[m for m in ('torch', 'ray', 'vllm') if m in sys.modules]"
    code = f"import sys, quatro_ray.config, quatro_ray.plan; print({heavy})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert out.stdout.strip() == "[]"


def every_section(model: type) -> list[type]:
    from pydantic import BaseModel

    found = [model]
    for field in model.model_fields.values():  # type: ignore[attr-defined]
        for part in getattr(field.annotation, "__args__", [field.annotation]):
            if isinstance(part, type) and issubclass(part, BaseModel):
                found += every_section(part)
    return found


def test_every_section_refuses_unknown_keys() -> None:
    for section in every_section(Config):
        assert section.model_config["extra"] == "forbid", section  # type: ignore[attr-defined]


def test_fields_of_named_sections_are_listed() -> None:
    text = describe_fields("rewards")
    assert "# rewards.NAME (kind: math): " in text
    assert "rewards.NAME.limits.cpu_s: float = 5" in text
    assert "data.eval.NAME.max_rows: " in describe_fields("data")


@pytest.mark.parametrize("override", ["urls: ['http://me:hunter2@x']", "urls: ['http://x'], token_env: sk-hunter2"])
def test_what_may_be_a_secret_is_not_shown(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, config_tree()), [f"rewards.far={{kind: http, {override}}}"])
    assert "hunter2" not in str(caught.value)


def test_a_section_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, config_tree())
    path.write_text(path.read_text() + "\nlearner: {num_ranks: 1}\n")
    with pytest.raises(ConfigError, match="'learner' stands twice in one mapping; remove one of them"):
        load_config(path)


def test_paths_do_not_depend_on_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    sections = {"model": {"kind": "pretrained", "path": "mine"}, "checkpoint": {"dir": "kept"}}
    made = config("runs/a", **sections)
    assert (made.run.dir, made.checkpoint_dir) == (tmp_path / "runs/a", tmp_path / "kept")
    assert made.model.path == str(tmp_path / "mine")  # type: ignore[union-attr]
    sections["model"]["path"] = "Qwen/Qwen2.5-1.5B"
    assert config("runs/a", **sections).model.path == "Qwen/Qwen2.5-1.5B"  # type: ignore[union-attr]
