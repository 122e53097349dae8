"""What a response is worth: the kinds of parts that a reward is made of."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from quatro_ray.config.base import FunctionPath, ModelPath, Section

Extraction = Literal["whole", "boxed", "answer_tag", "hashes", "last_number"]


class _Part(Section):
    weight: float = 1.0
    """Factor in the sum."""
    only: tuple[str, ...] | None = None
    """Sources of data.train and data.eval that this part judges; null: all."""


class _Extracting(_Part):
    extract: Extraction = "whole"
    """Where in the response the answer stands. whole: all of it; boxed: the last \\boxed{…}; answer_tag: the last
    <answer>…</answer>; hashes: after the last ####; last_number. Nothing there: the answer is wrong."""


class IntegerRewardConfig(_Extracting):
    """1 where the answer is the integer asked for, digit by digit; else 0. For arithmetic: `5+7` is not 12."""

    kind: Literal["integer"]


class ExactRewardConfig(_Extracting):
    """1 where the answer equals the one asked for, white space at the ends aside; else 0."""

    kind: Literal["exact"]
    ignore_case: bool = False


class MathRewardConfig(_Extracting):
    """1 where math-verify takes the answer for equal to the one asked for, as numbers, sets or expressions; else 0."""

    kind: Literal["math"]
    extract: Extraction = "boxed"
    """Where in the response the answer stands, as for the other kinds."""
    max_answer_chars: int = Field(1000, ge=1)
    """A longer answer is wrong: none that anyone asks for is that long, and parsing it costs."""


class RegexRewardConfig(_Part):
    """1 where the pattern matches the response; else 0."""

    kind: Literal["regex"]
    pattern: str
    """Python's `re`; `.` matches line ends too."""
    match: Literal["search", "full"] = "search"
    """full: the pattern must cover the whole response."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"must be a regular expression ({error}); correct it") from error
        return pattern


class FormatRewardConfig(_Part):
    """1 where the response is these tags once each, in this order, and nothing outside of them; else 0."""

    kind: Literal["format"]
    tags: tuple[str, ...] = Field(("think", "answer"), min_length=1)


class LengthRewardConfig(_Part):
    """0 up to max_tokens − buffer_tokens, then down in a line to −1 at max_tokens. DAPO, arXiv 2503.14476, eq. 13."""

    kind: Literal["length"]
    max_tokens: int = Field(ge=1)
    buffer_tokens: int = Field(ge=1)

    @model_validator(mode="after")
    def _fits(self) -> LengthRewardConfig:
        if self.buffer_tokens > self.max_tokens:
            raise ValueError(
                f"buffer_tokens={self.buffer_tokens} must be at most max_tokens={self.max_tokens}: lower it"
            )
        return self


class ReasoningGymRewardConfig(_Extracting):
    """The scorer of the reasoning-gym task that made the query. Some execute the response: they run sandboxed."""

    kind: Literal["reasoning_gym"]
    threshold: float | None = Field(1.0, gt=0, le=1)
    """The scorer's value at which an answer counts as right (1, else 0). null: its value as it is, partial credit."""


class SandboxLimits(Section):
    """Of one program that runs in the sandbox."""

    cpu_s: float = Field(5, gt=0)
    wall_s: float = Field(8, gt=0)
    memory_mib: int = Field(512, ge=64)
    max_processes: int = Field(32, ge=1)
    output_kib: int = Field(256, ge=1)
    """Of standard output; the same for each file that the program writes."""


class CodeRewardConfig(_Part):
    """Runs the response's Python program against the query's test cases, sandboxed with bubblewrap."""

    kind: Literal["code"]
    limits: SandboxLimits = SandboxLimits()
    """For each test case."""
    all_tests: bool = True
    """1 only where all test cases pass; false: the share that passes."""


class _Remote(_Part):
    urls: tuple[str, ...] = Field(min_length=1)
    """Endpoints; requests go round, and past those that fail."""
    token_env: str | None = None
    """Name of the environment variable with the bearer token. Never the token itself: configurations end up in logs."""
    timeout_s: float = Field(30, gt=0)
    """For one request."""
    max_tries: int = Field(4, ge=1)
    """With growing pauses, on time-outs, lost connections, 429 and 5xx. Other 4xx fail at once."""
    max_concurrency: int = Field(32, ge=1)
    """Requests under way at the same time, per verifier actor."""

    @field_validator("urls")
    @classmethod
    def _are_http(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            if not re.match(r"https?://[^/@\s]+(/\S*)?$", url):
                shown = repr(url) if "@" not in url else "a URL"  # what stands before the @ may be a secret
                raise ValueError(f"{shown} must be http://host… or https://host…, without user or password; correct it")
        return urls

    @field_validator("token_env")
    @classmethod
    def _is_a_name(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError("is no name of an environment variable (nor shown: it may be the token); correct it")
        return name


class SandboxFusionRewardConfig(_Remote):
    """Runs the response's program against the query's test cases on SandboxFusion servers (POST /run_code)."""

    kind: Literal["sandbox_fusion"]
    limits: SandboxLimits = SandboxLimits()
    all_tests: bool = True
    """1 only where all test cases pass; false: the share that passes."""

    @model_validator(mode="after")
    def _time_to_answer(self) -> SandboxFusionRewardConfig:
        if self.timeout_s <= self.limits.wall_s:
            raise ValueError(
                f"timeout_s={self.timeout_s:g} must exceed limits.wall_s={self.limits.wall_s:g}: a program that loops "
                "would count as a server that does not answer; raise it"
            )
        return self


class HttpRewardConfig(_Remote):
    """A reward server: POST of query, prompts and labels, answered by rewards (OpenRLHF's shape). docs/rewards.md."""

    kind: Literal["http"]
    max_batch: int = Field(16, ge=1)
    """Responses in one request."""
    max_wait_s: float = Field(0.02, ge=0)
    """How long a response waits for others to share its request."""


class ModelRewardConfig(_Part):
    """A reward model, served by vLLM's pooling interface in actors of its own."""

    kind: Literal["model"]
    path: ModelPath
    """Folder or hub name of a sequence-classification model with one label. Its raw logit is the reward."""
    num_engines: int = Field(1, ge=1)
    max_tokens: int = Field(4096, ge=1)
    """Longest conversation; more is cut off at the left."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Of the model; its score head is computed in float32 in any case."""
    gpu_memory_utilization: float = Field(0.85, gt=0, lt=1)
    """Share of a GPU for an engine (ignored on CPU)."""
    kv_cache_gib: float = Field(1.0, gt=0)
    """Key-value cache of an engine on CPU, GiB (ignored on GPUs)."""
    start_deadline_s: float = Field(600, gt=0)
    timeout_s: float = Field(60, gt=0)
    """For one response, all engines that are tried included."""


class PythonRewardConfig(_Part):
    """A function of yours: (query: Query, response: Response) -> float, in isolated worker processes."""

    kind: Literal["python"]
    function: FunctionPath
    """`module:name`, or `path/to/file.py:name`."""


class EnvironmentRewardConfig(_Part):
    """What the episode itself returned (docs/environments.md)."""

    kind: Literal["environment"]
    key: str = "reward"
    """Which of the values it returned; a single number has the name `reward`."""


RewardConfig = Annotated[
    IntegerRewardConfig
    | ExactRewardConfig
    | MathRewardConfig
    | RegexRewardConfig
    | FormatRewardConfig
    | LengthRewardConfig
    | ReasoningGymRewardConfig
    | CodeRewardConfig
    | SandboxFusionRewardConfig
    | HttpRewardConfig
    | ModelRewardConfig
    | PythonRewardConfig
    | EnvironmentRewardConfig,
    Field(discriminator="kind"),
]
