"""The `data` and `filters` sections: sources of queries, and filters of scored groups."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, JsonValue, field_validator

from quatro_ray.config.base import Accepts, Section
from quatro_ray.config.paths import FolderOrName, InputPath
from quatro_ray.config.rewards import Extraction

_SET_BY_US = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "max_length",
        "messages",
        "padding",
        "return_dict",
        "return_tensors",
        "tokenize",
        "truncation",
    }
)
"""Arguments of transformers' apply_chat_template that no source may set."""


class _Source(Section):
    weight: float | None = Field(None, gt=0)
    """Relative share of this source among the queries drawn. null: its number of queries."""
    environment: str | None = None
    """Name in `environments`; each rollout is then one of its episodes. null: a single turn."""


class _Prompts(_Source):
    chat_template_kwargs: dict[str, JsonValue] = Field({})
    """Variables for the model's chat template, the same for every chat of this source, such as {enable_thinking: false}
    for Qwen3. A name that the template does not mention is refused."""

    @field_validator("chat_template_kwargs")
    @classmethod
    def _leaves_ours_alone(cls, kwargs: dict[str, JsonValue]) -> dict[str, JsonValue]:
        if ours := sorted(kwargs.keys() & _SET_BY_US):
            raise ValueError(f"{', '.join(ours)}: set by quatro_ray for each prompt; remove it")
        return kwargs


class _Rows(_Prompts):
    prompt_key: str | None = None
    """Column with a string or with chat messages (role, content); dots reach nested columns. null: the first column
    that exists of prompt, messages, question, problem, query, input."""
    answer_key: str | None = None
    """Column with the answer. null: the first that exists of answer, reward_model.ground_truth, ground_truth,
    final_answer, label, solution, target."""
    answer_extract: Extraction = "whole"
    """Place of the answer in that column. hashes suits GSM8K (after ####), boxed suits MATH (the last box)."""
    prompt_template: Annotated[str, Accepts("a string that contains {prompt}")] = "{prompt}"
    """Text around a prompt that is a string; {prompt} and the names of other columns are replaced."""
    as_chat: bool = False
    """Make a string prompt a user message and apply the tokenizer's chat template."""
    system_prompt: str | None = None
    """System message for prompts that have none; a string prompt becomes the user message after it."""
    max_rows: int | None = Field(None, ge=1)
    """Use only this many rows, the first ones. null: all."""

    @field_validator("prompt_template")
    @classmethod
    def _contains_the_prompt(cls, template: str) -> str:
        if "{prompt}" not in template:
            raise ValueError("must contain {prompt}; put it in place of the question")
        return template


def _listed(path: object) -> object:
    return (str(path),) if isinstance(path, str | Path) else path


FilePaths = Annotated[
    tuple[InputPath, ...],
    BeforeValidator(_listed),
    Field(min_length=1),
    Accepts("a path, a pattern, or a list of them"),
]
"""Paths of files; a single one is a list of one."""


class JsonLinesSourceConfig(_Rows):
    """JSON Lines files: one object per line."""

    kind: Literal["jsonl"]
    path: FilePaths
    """A file (also .gz, .bz2 or .xz), a pattern such as data/*.jsonl, or a list of them. Files that match a pattern are
    read in the order of their names; a relative path starts at the current directory."""


class ParquetSourceConfig(_Rows):
    """Parquet files."""

    kind: Literal["parquet"]
    path: FilePaths
    """A file, a pattern such as data/*.parquet, or a list of them. Files that match a pattern are read in the order of
    their names; a relative path starts at the current directory."""


class HuggingFaceSourceConfig(_Rows):
    """A dataset of the `datasets` library: a folder that `save_to_disk` wrote, or a name on the hub."""

    kind: Literal["hf"]
    path: FolderOrName
    """Folder, or name on the hub such as openai/gsm8k."""
    name: str | None = None
    """Configuration of the dataset on the hub, such as `main` of openai/gsm8k."""
    split: str | None = None
    """Split to use, such as train. Required on the hub, and for a folder that holds several."""
    revision: str | None = None
    """Commit of the dataset on the hub; pin it to train on the same data again."""


class ReasoningGymSourceConfig(_Prompts):
    """Distinct questions of a reasoning-gym task, to be scored by the reward `reasoning_gym`."""

    kind: Literal["reasoning_gym"]
    task: str
    """Name of the task; `quatro-ray tasks` lists all."""
    params: dict[str, object] = Field({})
    """Settings of the task, as reasoning_gym.create_dataset takes them."""
    size: int = Field(ge=1)
    """Items to generate; fewer remain if questions recur."""
    seed: int = Field(0, ge=0)
    """Seed of the generated questions. Give train and eval different ones."""
    prompt_template: str = "{prompt}"
    """Text around the question, which replaces {prompt}; an answer format is not added by itself."""
    as_chat: bool = False
    """Make the question a user message and apply the tokenizer's chat template."""
    system_prompt: str | None = None
    """System message before the question, which then becomes a user message."""


class ChainSumSourceConfig(_Source):
    """Distinct questions of reasoning-gym's chain_sum, rendered tersely (`12+34=`) for models too small for English."""

    kind: Literal["chain_sum"]
    min_terms: int = Field(2, ge=2)
    """Fewest terms of a sum."""
    max_terms: int = Field(2, ge=2)
    """Most terms of a sum. Raise it for harder questions."""
    min_digits: int = Field(1, ge=1)
    """Fewest digits of a term."""
    max_digits: int = Field(2, ge=1)
    """Most digits of a term. Raise it for harder questions."""
    num_questions: int = Field(4096, ge=1)
    """Distinct questions to generate."""
    seed: int = Field(0, ge=0)
    """Seed of the generated questions. Give train and eval different ones."""

    def broken_rules(self) -> Iterator[str]:
        """Yield a line for each range, of terms or of digits, that is empty."""
        for name, low, high in [
            ("terms", self.min_terms, self.max_terms),
            ("digits", self.min_digits, self.max_digits),
        ]:
            if low > high:
                yield f"min_{name}={low} must be at most max_{name}={high}; lower it or raise max_{name}"


class VerifiersSourceConfig(_Prompts):
    """The dataset of an environment of the `verifiers` library, which must be installed (docs/environments.md)."""

    kind: Literal["verifiers"]
    env: str
    """Name of the environment, as verifiers.load_environment takes it."""
    args: dict[str, JsonValue] = Field({})
    """Further arguments of verifiers.load_environment, by name."""
    split: Literal["train", "eval"] = "train"
    """Which of the environment's two datasets to use."""
    max_rows: int | None = Field(None, ge=1)
    """Use only this many rows, the first ones. null: all."""

    def broken_rules(self) -> Iterator[str]:
        """Yield a line if the source names no environment, although its dataset is made for one."""
        if self.environment is None:
            yield (
                "environment is missing: name an entry of `environments` whose function is "
                "quatro_ray.environments.verifiers_library:episode, because the dataset is made for it"
            )


SourceConfig = Annotated[
    JsonLinesSourceConfig
    | ParquetSourceConfig
    | HuggingFaceSourceConfig
    | ReasoningGymSourceConfig
    | ChainSumSourceConfig
    | VerifiersSourceConfig,
    Field(discriminator="kind"),
]


class TrainShareSourceConfig(_Source):
    """Questions that are held out of a source of data.train; only data.eval may have it."""

    kind: Literal["train_share"]
    source: str
    """Name of the source in data.train."""
    share: float = Field(gt=0, lt=1)
    """Share of that source's distinct questions that is held out."""
    seed: int = Field(0, ge=0)
    """Seed of the choice. It depends on each question alone, so rows that are added later move few others."""


EvalSourceConfig = Annotated[
    JsonLinesSourceConfig
    | ParquetSourceConfig
    | HuggingFaceSourceConfig
    | ReasoningGymSourceConfig
    | ChainSumSourceConfig
    | VerifiersSourceConfig
    | TrainShareSourceConfig,
    Field(discriminator="kind"),
]


class DataConfig(Section):
    """Sources of queries, by name. A question of `eval` is never trained on, whatever template."""

    train: dict[str, SourceConfig] = Field(min_length=1)
    """Sources of training queries, drawn in proportion to their weights; each is shuffled anew every epoch."""
    eval: dict[str, EvalSourceConfig] = Field(min_length=1)
    """Held-out sets; each is evaluated by itself."""
    warmup: SourceConfig | None = None
    """Source that a model of kind tiny imitates before RL; its first 128 rows are held out. null: data.train."""
    shuffle: bool = True
    """Shuffle each source every epoch. false: keep the order of the rows, for curricula."""
    bad_rows: Literal["refuse", "skip"] = "refuse"
    """Treatment of a row that cannot be used (no prompt, an answer that its reward cannot compare with, a prompt that
    is too long, a held-out prompt in train). refuse: end with its file and line. skip: leave it out and count it with
    its reason."""

    def broken_rules(self) -> Iterator[str]:
        """Yield a line for each held-out share of a source that does not exist or plays in another environment."""
        for name, share in self.eval.items():
            if not isinstance(share, TrainShareSourceConfig):
                continue
            if (source := self.train.get(share.source)) is None:
                yield (
                    f"eval.{name}.source={share.source!r} must be a source of data.train, one of "
                    f"{sorted(self.train)}; correct it"
                )
            elif source.environment != share.environment:
                yield (
                    f"eval.{name}.environment={share.environment!r} must be that of data.train.{share.source}, "
                    f"{source.environment!r}; set it"
                )


class FilterConfig(Section):
    """Filters of scored groups: a group that is not worth a step is dropped with a reason before it is trained on."""

    drop_zero_variance: bool = False
    """Drop groups whose rewards are all equal, which prefer nothing (DAPO's dynamic sampling)."""
    min_mean_reward: float | None = None
    """Drop groups with a lower mean reward: too hard for now. null: no lower bound."""
    max_mean_reward: float | None = None
    """Drop groups with a higher mean reward: solved. null: no upper bound."""
    max_truncated_share: float | None = Field(None, ge=0, lt=1)
    """Drop groups in which a larger share of the responses met the token limit, because their rewards tell of the
    limit and not of the answer. null: keep them."""
    max_in_a_row: int = Field(1000, ge=1)
    """Consecutive dropped groups that end the run, because filters that let nothing pass would spin for ever."""

    def broken_rules(self) -> Iterator[str]:
        """Yield a line if the lower bound on the mean reward is not below the upper one."""
        low, high = self.min_mean_reward, self.max_mean_reward
        if low is not None and high is not None and low >= high:
            yield f"min_mean_reward={low:g} must be below max_mean_reward={high:g}: lower it"
