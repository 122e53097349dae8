"""Where queries come from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, field_validator, model_validator

from quatro_ray.config.base import Section
from quatro_ray.config.rewards import Extraction


class _Source(Section):
    weight: float | None = Field(None, gt=0)
    """Relative share of this source among the queries drawn; null: its number of queries."""
    environment: str | None = None
    """Name in `environments`: each rollout is an episode of it. null: one turn."""


class _Rows(_Source):
    prompt_key: str | None = None
    """Column with a string or with chat messages (role, content); dots go into nested columns. null: the first of
    prompt, messages, question, problem, query, input that is there."""
    answer_key: str | None = None
    """Column with the answer. null: the first of answer, reward_model.ground_truth, ground_truth, final_answer,
    label, solution, target that is there."""
    answer_extract: Extraction = "whole"
    """Where in that column the answer stands: GSM8K's is after ####, MATH's in the last box."""
    prompt_template: str = "{prompt}"
    """Around a prompt that is a string; {prompt} and the names of other columns are put in."""
    as_chat: bool = False
    """Make a string prompt a user message, for the tokenizer's chat template."""
    system_prompt: str | None = None
    """System message before prompts that have none; a string prompt becomes a user message after it."""
    max_rows: int | None = Field(None, ge=1)
    """Only the first so many rows."""

    @field_validator("prompt_template")
    @classmethod
    def _holds_the_prompt(cls, template: str) -> str:
        if "{prompt}" not in template:
            raise ValueError("must contain {prompt}; put it where the question belongs")
        return template


class JsonLinesSourceConfig(_Rows):
    """One JSON object a line."""

    kind: Literal["jsonl"]
    path: Path


class ParquetSourceConfig(_Rows):
    """A Parquet file."""

    kind: Literal["parquet"]
    path: Path


class HuggingFaceSourceConfig(_Rows):
    """A dataset of the `datasets` library: a folder that `save_to_disk` wrote, or a name on the hub."""

    kind: Literal["hf"]
    path: str
    name: str | None = None
    """Its configuration on the hub, such as `main` of openai/gsm8k."""
    split: str | None = None
    """Required on the hub, and for a folder that holds several."""
    revision: str | None = None
    """Commit of the dataset on the hub; pin it to train on the same data again."""


class ReasoningGymSourceConfig(_Source):
    """Questions of a reasoning-gym task, distinct ones only. Judge them with the reward `reasoning_gym`."""

    kind: Literal["reasoning_gym"]
    task: str
    """Its name there; `quatro-ray tasks` lists all."""
    params: dict[str, Any] = Field({})
    """Of the task, as reasoning_gym.create_dataset takes them."""
    size: int = Field(ge=1)
    """Items to generate; fewer are left where questions recur."""
    seed: int = Field(0, ge=0)
    prompt_template: str = "{prompt}"
    """{prompt}: the question; {answer_format} is not added by itself."""
    as_chat: bool = False
    system_prompt: str | None = None


class ChainSumSourceConfig(_Source):
    """reasoning-gym's chain_sum rendered tersely, `12+34=`, for models too small to read English; distinct."""

    kind: Literal["chain_sum"]
    min_terms: int = Field(2, ge=2)
    max_terms: int = Field(2, ge=2)
    min_digits: int = Field(1, ge=1)
    max_digits: int = Field(2, ge=1)
    num_questions: int = Field(4096, ge=1)
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _ranges(self) -> ChainSumSourceConfig:
        for name in ("terms", "digits"):
            low, high = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if low > high:
                raise ValueError(f"min_{name}={low} must be at most max_{name}={high}; lower it or raise max_{name}")
        return self


class VerifiersSourceConfig(_Source):
    """The data set of an environment of the `verifiers` library, which must be installed (docs/environments.md)."""

    kind: Literal["verifiers"]
    env: str
    """Its name, as verifiers.load_environment takes it."""
    args: dict[str, JsonValue] = Field({})
    """Further arguments of it."""
    split: Literal["train", "eval"] = "train"
    max_rows: int | None = Field(None, ge=1)
    """Only the first so many rows."""

    @model_validator(mode="after")
    def _has_an_environment(self) -> VerifiersSourceConfig:
        if self.environment is None:
            raise ValueError(
                "environment is missing: name one of `environments` whose function is "
                "quatro_ray.environments.verifiers_library:episode, since the data is made for it"
            )
        return self


SourceConfig = Annotated[
    JsonLinesSourceConfig
    | ParquetSourceConfig
    | HuggingFaceSourceConfig
    | ReasoningGymSourceConfig
    | ChainSumSourceConfig
    | VerifiersSourceConfig,
    Field(discriminator="kind"),
]


class DataConfig(Section):
    """Sources by name. Prompts of `eval` are never trained on: those that stand in `train` too are taken out of it."""

    train: dict[str, SourceConfig] = Field(min_length=1)
    """Drawn from in proportion to their weights, each shuffled anew every epoch."""
    eval: dict[str, SourceConfig] = Field(min_length=1)
    """Held-out sets; each is evaluated by itself."""
    warmup: SourceConfig | None = None
    """What a model of kind tiny imitates before RL; its first 128 rows are held out. null: train."""
    shuffle: bool = True
    """false: every epoch in the order of the rows."""
    bad_rows: Literal["refuse", "skip"] = "refuse"
    """A row that cannot be used (no prompt, an answer its reward cannot compare with, too long a prompt, a held-out
    prompt in train): end with its file and line, or leave it out and count it with its reason."""


class FilterConfig(Section):
    """Scored groups that are not worth a step: dropped with a reason before they reach the learner."""

    drop_zero_variance: bool = False
    """All rewards equal: nothing to prefer (DAPO's dynamic sampling)."""
    min_mean_reward: float | None = None
    """Below: too hard for now."""
    max_mean_reward: float | None = None
    """Above: solved."""
    max_truncated_share: float | None = Field(None, ge=0, lt=1)
    """More of the responses than this met the token limit: their rewards are of the limit, not of the answer."""
    max_in_a_row: int = Field(1000, ge=1)
    """So many dropped without one kept end the run: filters that let nothing pass would spin for ever."""

    @model_validator(mode="after")
    def _band(self) -> FilterConfig:
        low, high = self.min_mean_reward, self.max_mean_reward
        if low is not None and high is not None and low >= high:
            raise ValueError(f"min_mean_reward={low} must be below max_mean_reward={high}: lower it")
        return self
