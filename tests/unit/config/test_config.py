"""The configuration: strict, clear about what is wrong, importable without the heavy libraries."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from quatro_ray.config import Config, Section, dump_config, load_config
from quatro_ray.config.field_reference import describe_fields
from quatro_ray.config.field_types import accepts, sections_in
from quatro_ray.errors import ConfigError
from tests.make import config, config_tree

ROOT = Path(__file__).parents[3]


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
        ("learner.learning_rate=-1", "learner.learning_rate=-1: must be a number > 0; change it"),
        ("learner.learning_rate=fast", "learner.learning_rate='fast'"),
        ("learner.tokens_per_micro_batch=20", "must hold the longest rollout"),
        ("learner.num_ranks=99", "every rank needs one"),
        ("objective={kind: ppo}", "objective.kind='ppo': must be one of quatro, grpo, "),
        ("objective={kind: quatro, importance: {truncation: 0.5}}", "truncation=0.5"),
        ("weight_sync.backend=nccl", "weight_sync.backend=nccl needs cluster.device=cuda"),
        ("learner.attn_implementation=flash_attention_2", "needs cluster.device=cuda"),
        ("learner.offload_parameters=true", "needs offload=cpu"),
        ("learner.sequence_parallel_size=3", "must divide num_ranks"),
        ("learner.hpz_partition_size=3", "must divide num_ranks"),
        ("learner.num_warmup_steps=3", "the learning rate would never be reached"),
        ("generator.engine_args={seed: 3}", "generator.engine_args may not contain seed"),
        ("generator.engine_args={pipeline_parallel_size: 2}", "sets these from its own fields"),
        ("generator.engine_args={data_parallel_rank: 1}", "pipeline_parallel_size and data_parallel_size of generator"),
        ("generator.engine_args={speculative_config: {method: ngram}}", "speculative_config needs cluster.device=cuda"),
        ("generator.engine_args={logits_processors: [x]}", "so importance ratios would be wrong; remove them"),
        ("generator.engine_args={enable_lora: true}", "not contain enable_lora: quatro_ray sets these from its own"),
        ("generator.engine_args={enable_sleep_mode: true}", "not contain enable_sleep_mode: quatro_ray sets these"),
        ("generator.engine_args={tokens_only: true}", "with the policy's own weights; remove them"),
        (
            "generator={deterministic: true, num_engines: 2, max_prompt_tokens: 4, max_response_tokens: 4}",
            "num_engines=1",
        ),
        (
            "generator={deterministic: true, data_parallel_size: 2, max_prompt_tokens: 4, max_response_tokens: 4}",
            "needs data_parallel_size=1",
        ),
        ("model={kind: tiny, hidden_size: 48}", "multiple of 32*num_heads"),
        ("data.train.sums.min_terms=5", "min_terms=5 must be at most max_terms=2"),
        ("data.train={}", "data.train={}: must be a mapping with at least 1 entry"),
        ("data.train.sums.kind=csv", "kind='csv': must be one of jsonl, parquet, hf, reasoning_gym, chain_sum, "),
        ("data.train.f={kind: jsonl, path: x, prompt_template: hello}", "must contain {prompt}"),
        ("rewards={}", "at least 1 entry"),
        ("rewards.answer.kind=guess", "must be one of integer, exact, math, "),
        ("rewards={a: {kind: exact}, b: {kind: exact, only: [x]}}", "rewards.b.only=['x']: no source has that name"),
        ("rewards={a: {kind: exact, only: []}}", "no reward scores the source 'sums'"),
        ("rewards.shape={kind: regex, pattern: '('}", "must be a regular expression"),
        ("rewards.short={kind: length, max_tokens: 5, buffer_tokens: 6}", "must be at most max_tokens=5"),
        ("rewards.mine={kind: python, function: foo}", "must have the form module:name"),
        ("rewards.mine={kind: python, function: 'nowhere/x.py:f'}", "there is no file nowhere/x.py"),
        ("rewards.far={kind: http, urls: ['ftp://x']}", "must be http://host"),
        ("rewards.far={kind: http, urls: ['http://me:secret@x']}", "without user, password or query"),
        ("rewards.far={kind: http, urls: ['http://x/score?api_key=secret']}", "without user, password or query"),
        ("rewards.far={kind: http, urls: ['http://x/score#secret']}", "without user, password or query"),
        ("verifier.pass_env=[sk-secret]", "must be the name of an environment variable"),
        ("filters={min_mean_reward: 0.8, max_mean_reward: 0.2}", "must be below max_mean_reward=0.2"),
        ("evaluation.pass_at=[1, 16]", "no k above samples_per_query=8"),
        ("evaluation.pass_at=[2]", "must hold 1"),
        ("learner", "must have the form section.field=value"),
        ("run.seed.x=1", "is a value, not a section"),
        ("run.seed={", "override 'run.seed={': is not YAML (while parsing"),
        ("run.dir=2024-13-45", "month must be in 1..12"),
        ("model={kind: tiny, kind: tiny}", "'kind' stands twice in one mapping"),
        ("run.seed=5000000000", "must be an integer in [0, 4294967296)"),
        ("objective={kind: quatro, tilt_share: -1}", "objective.tilt_share=-1: must be a number in (0, 1)"),
        ("objective={kind: dppo, threshold: 2}", "threshold=2 must be below 1 for divergence: tv"),
        ("objective={kind: quatro, tilt_share: .inf}", "tilt_share=inf: must be a finite number"),
        ("verifier.exhausted_reward=.nan", "must be a finite number"),
        ("generator.top_p=0.9", "generator.top_p=0.9: must be 1: importance ratios"),
        ("generator.temperature=3", "must be a number in [0.01, 2]"),
        ("evaluation.temperature=0", "set samples_per_query to 1 instead of 8, and pass_at to [1]"),
        ("generator.engine_args={hf_token: x}", "a token belongs in the environment"),
        (
            "rewards.far={kind: http, urls: ['http://x'], token_env: sk-a1}",
            "must be the name of an environment variable",
        ),
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


def test_a_packaged_configuration_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config(Path("demo")).run.dir == tmp_path / "runs/demo"
    with pytest.raises(ConfigError, match=r"^dmeo: cannot be read .*, or the name of a packaged configuration: demo$"):
        load_config(Path("dmeo"))
    (tmp_path / "demo").mkdir()
    assert load_config(Path("demo")).run.dir == tmp_path / "runs/demo"
    (tmp_path / "demo").rmdir()
    (tmp_path / "demo").write_text("- 1")
    with pytest.raises(ConfigError, match=r"^demo: must be a mapping"):  # a file of this name comes first
        load_config(Path("demo"))


@pytest.mark.process
def test_import_is_light() -> None:
    heavy = "[m for m in ('torch', 'ray', 'vllm') if m in sys.modules]"
    code = f"import sys, quatro_ray.config, quatro_ray.orchestrator.resources; print({heavy})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert out.stdout.strip() == "[]"


def every_section(annotation: object = Config) -> Iterator[type[Section]]:
    """All sections, and all kinds of those that have several."""
    for section in sections_in(annotation):
        yield section
        for field in section.model_fields.values():
            yield from every_section(field)


SECTIONS = sorted(set(every_section()), key=lambda section: section.__name__)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_section_is_strict_and_says_what_its_fields_are(section: type[Section]) -> None:
    assert section.model_config["extra"] == "forbid"
    assert section.__doc__
    for name, field in section.model_fields.items():
        if name == "kind":  # the title of the section says which
            continue
        meaning = field.description or ""
        assert len(meaning.split()) >= 2 and meaning.endswith("."), f"{name}: {meaning!r}"
        assert not re.match(RIDDLE, meaning), f"{name}: {meaning!r}"
        accepted = accepts(field)
        assert accepted and not re.search(PYTHON, accepted), f"{name}: {accepted!r}"


RIDDLE = r"(Of|By|Where|Who|Whoever|What|With|For|To|From|As|Until|While|Because)\b"
PYTHON = r"typing|pathlib|Literal|Optional|Annotated|Union|None|dict|tuple|\bint\b|\bstr\b|\bfloat\b|<|\w\(\w+="


def test_sections_of_every_kind_are_covered() -> None:
    names = {section.__name__ for section in SECTIONS}
    assert {"WarmupConfig", "SandboxLimits", "ImportanceConfig", "VerifiersSourceConfig", "EnvironmentConfig"} <= names
    assert sum(len(section.model_fields) for section in SECTIONS) > 250


def test_the_list_of_fields_is_readable() -> None:
    text = describe_fields()
    for line in text.splitlines():
        if line.startswith("    ") or not line:
            continue
        if line.startswith("#"):
            assert line.endswith("."), line
        else:
            assert not re.search(PYTHON, line.partition(": ")[2]), line
    assert "NAME" in text and "model.num_layers: an integer ≥ 1; default 2" in text


@pytest.mark.parametrize(
    "line",
    [
        "run.dir: a path; required",
        "run.seed: an integer in [0, 4294967296); default 0",
        "run.resume: one of never, auto; default never",
        "verifier.num_workers: an integer ≥ 1; default 2",
        "learner.step_control.probe_share: a number in (0, 1]; default 0.125",
        "learner.loss_agg_mode: one of token_mean, prompt_mean, seq_mean_token_sum, seq_mean_token_mean, "
        "seq_mean_token_sum_norm or null; default null",
        "checkpoint.dir: a path or null; default null",
        "evaluation.pass_at: a list of integers with at least 1 entry; default [1, 8]",
        'telemetry.trackers: a list of tensorboard, wandb, mlflow, trackio, swanlab; default ["tensorboard"]',
        "telemetry.callbacks: a list of module:name or path/to/file.py:name; default []",
        "generator.engine_args: a mapping; default {}",
        "model.path: a folder or a name on the hub; required",
        "environments.NAME.function: module:name or path/to/file.py:name; required",
    ],
)
def test_rules_and_defaults_are_words(line: str) -> None:
    assert line in describe_fields().splitlines()


def test_fields_of_named_sections_are_listed() -> None:
    text = describe_fields("rewards")
    assert "# rewards.NAME (kind: math): " in text
    assert "rewards.NAME.limits.cpu_s: a number > 0; default 5" in text
    assert "data.eval.NAME.max_rows: " in describe_fields("data")


def problems(tmp_path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, config_tree()), list(overrides))
    heading, *lines = str(caught.value).splitlines()
    assert heading.endswith(f": {len(lines)} rules are broken")
    return [line.removeprefix("  ") for line in lines]


def test_all_bad_fields_are_reported_together(tmp_path: Path) -> None:
    found = problems(
        tmp_path, "run.seed=-1", "learner.lr=1", "verifier.num_workers=many", "rewards.a={kind: length}", "model={}"
    )
    assert sorted(line.split(":")[0] for line in found) == [
        "learner.lr", "model.kind", "rewards.a.buffer_tokens", "rewards.a.max_tokens", "run.seed=-1",
        "verifier.num_workers='many'",
    ]  # fmt: skip


def test_all_rules_that_span_sections_are_reported_together(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        "learner.num_ranks=99",
        "learner.tokens_per_micro_batch=3",
        "learner.num_warmup_steps=7",
        "learner.attn_implementation=flash_attention_2",
        "learner.loss_agg_mode=token_mean",
        "objective={kind: gspo}",
        "weight_sync.backend=nccl",
        "rewards.answer.only=[x]",
        "rewards.code={kind: code, only: [x], limits: {wall_s: 99}}",
        "data.train.more={kind: chain_sum, environment: there}",
    )
    starts = (
        "rewards.answer.only=", "rewards.code.only=", "rewards: no reward scores the source 'more'",
        "rewards: no reward scores the source 'sums'", "data: the source 'more'", "verifier.deadline_s=10 ",
        "learner.tokens_per_micro_batch=3 ", "learner.num_ranks=99 ", "learner.loss_agg_mode=token_mean ",
        "weight_sync.backend=nccl ", "learner.attn_implementation=", "learner.num_warmup_steps=7 ",
    )  # fmt: skip
    assert [next(s for s in starts if line.startswith(s)) for line in found] == list(starts)


def test_all_rules_of_one_section_are_reported_together(tmp_path: Path) -> None:
    found = problems(tmp_path, "evaluation={temperature: 0, pass_at: [2]}", "generator.min_engines=2")
    assert [line.split("=")[0] for line in found] == [
        "generator.min_engines",
        "evaluation.temperature",
        "evaluation.pass_at",
    ]


def test_all_bad_overrides_are_reported_together(tmp_path: Path) -> None:
    found = problems(tmp_path, "learner", "run.seed=1", "run.seed.x=1", "run.seed={")
    assert [line.split(":")[0] for line in found] == [
        "override 'learner'",
        "override 'run.seed.x=1'",
        "override 'run.seed={'",
    ]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("generator.temprature=1", "did you mean generator.temperature? (`quatro-ray fields generator` lists all)"),
        ("genertor.temperature=1", "genertor: unknown field; did you mean generator? (`quatro-ray fields` lists all)"),
        ("objective.tilt_shares=1", "did you mean objective.tilt_share?"),
        ("data.train.sums.max_term=1", "did you mean data.train.sums.max_terms?"),
        ("rewards.c={kind: code, limits: {cpus: 2}}", "did you mean rewards.c.limits.cpu_s?"),
        ("learning_rte=1", "learning_rte: unknown field; did you mean learner.learning_rate?"),
        ("objective.kind=grop", "reinforce, user; did you mean grpo?"),
        ("objective=grpo", "objective='grpo': must be a mapping of fields; write {kind: grpo}"),
        ("rewards.answer.kind=exat", "did you mean exact?"),
        ("learner.dtype=float23", "learner.dtype='float23': must be one of float32, bfloat16; did you mean float32?"),
        ("data.train={a:{kind:jsonl}}", "data.train.a.kind: required field is missing; add it, one of jsonl, "),
        ("data.train={a:{kind:jsonl}}", "(YAML needs a blank after the colon: kind: jsonl)"),
        ("data.train={1: {kind: jsonl, path: x}}", "data.train.1: a name must be a string, not 1; quote it"),
        ("generator.engine_args={1: 2}", "generator.engine_args.1: a name must be a string, not 1; quote it"),
        ("objective={kind: quatro, max_eta: 8}", "objective.max_eta: unknown field; it was removed: tilt_share"),
        ("objective={kind: quatro, kl_budget_unit: token}", "set tilt_share for how far one group"),
        ("objective={kind: quatro, drift_nats_per_token: 1}", "it was removed: max_token_shift stops tokens"),
        ("objective={kind: quatro, staleness_exponent: 1}", "it was removed: max_token_shift stops tokens"),
        (
            "telemetry.tensorboard=false",
            "telemetry.tensorboard: unknown field; it was removed: list it in",
        ),
        ("telemetry.trackers=[wandbb]", "swanlab; did you mean wandb?"),
        ("telemetry.trackers=[wandb, wandb]", "telemetry.trackers=['wandb', 'wandb'] has wandb twice: remove one"),
        (
            "telemetry.callbacks=[x]",
            "telemetry.callbacks.0='x': must have the form module:name or path",
        ),
        ("generator.zzz=1", "generator.zzz: unknown field; remove it or correct its spelling (`quatro-ray fields gen"),
        ("evaluation.pass_at=[x]", "evaluation.pass_at.0='x': must be an integer; change it"),
        ("verifier=", "verifier=null: must be a mapping of fields; change it"),
        ("data.warmup=4", "data.warmup=4: must be a mapping of fields or null; change it"),
        (
            "environments.x={function: 'a:b', params: {a: [2024-01-01]}}",
            "environments.x.params.a=2024-01-01: must be a JSON value; change it",
        ),
    ],
)
def test_errors_name_the_field_and_what_it_accepts(tmp_path: Path, override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, config_tree()), [override])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "urls: ['http://me:hunter2@x']",
        "urls: ['http://x'], token_env: sk-hunter2",
        "urls: 'http://me:hunter2@x'",
        "urls: ['http://x'], token: hunter2",
        "urls: ['http://x'], token_env: [hunter2]",
    ],
)
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
