"""The `rewards` section: the kinds of reward, of which a response receives the weighted sum."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator

from quatro_ray.config.base import Accepts, Section, variable_name
from quatro_ray.config.paths import FolderOrName, FunctionPath

Extraction = Literal["whole", "boxed", "answer_tag", "hashes", "last_number"]


MAX_ABS_REWARD = 1e6
"""Largest magnitude of a reward, of a weight and of the weighted sum."""


class _Reward(Section):
    weight: float = Field(1.0, ge=-MAX_ABS_REWARD, le=MAX_ABS_REWARD)
    """Factor of this reward in the weighted sum."""
    only: tuple[str, ...] | None = None
    """Sources of data.train and data.eval that this reward scores. null: all."""


class _Extracting(_Reward):
    extract: Extraction = "whole"
    """Place of the answer in the response. whole: all of it; boxed: the last \\boxed{…}; answer_tag: the last
    <answer>…</answer>; hashes: after the last ####; last_number: the last number, whole or not at all. If it is
    absent, the answer is wrong."""
    unclosed_think: Literal["no_answer", "search"] = "no_answer"
    """Treatment of a response that opens <think> and never closes it (such as one that a token limit ended), be it
    that the chat template opened it. no_answer: it has given no answer. search: an answer is looked for all the
    same."""


class IntegerRewardConfig(_Extracting):
    """Scores 1 if the answer is the expected integer, digit by digit, else 0. Suits arithmetic: `5+7` is not 12."""

    kind: Literal["integer"]


class ExactRewardConfig(_Extracting):
    """Scores 1 if the answer equals the expected one apart from white space at the ends, else 0."""

    kind: Literal["exact"]
    ignore_case: bool = False
    """Compare without regard to upper and lower case."""


class MathRewardConfig(_Extracting):
    """Scores 1 if math-verify finds the answer equal to the expected one, as number, set or expression, else 0."""

    kind: Literal["math"]
    extract: Extraction = "boxed"
    """Place of the answer in the response: whole, the last \\boxed{…}, the last <answer>…</answer>, after the last
    ####, or the last number. If it is absent, the answer is wrong."""
    max_answer_chars: int = Field(1000, ge=1)
    """Longest answer that is parsed, in characters; a longer one is wrong, because parsing it costs too much."""


class RegexRewardConfig(_Reward):
    """Scores 1 if the pattern matches the response, else 0."""

    kind: Literal["regex"]
    pattern: Annotated[str, Accepts("a regular expression")]
    """Regular expression of Python's `re`; `.` matches line ends too."""
    match: Literal["search", "full"] = "search"
    """search: the pattern may match anywhere. full: it must cover the whole response."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"must be a regular expression ({error}); correct it") from error
        return pattern


class FormatRewardConfig(_Reward):
    """Scores 1 if the response consists of these tags, once each in this order, and nothing outside them, else 0."""

    kind: Literal["format"]
    tags: tuple[str, ...] = Field(("think", "answer"), min_length=1)
    """Names of the tags, without brackets: think stands for <think>…</think>."""


class LengthRewardConfig(_Reward):
    """Scores 0 up to max_tokens − buffer_tokens, then linearly to −1 at max_tokens. DAPO, arXiv 2503.14476, eq. 13."""

    kind: Literal["length"]
    max_tokens: int = Field(ge=1)
    """Response length at which the penalty is full, in tokens; usually generator.max_response_tokens."""
    buffer_tokens: int = Field(ge=1)
    """Tokens before max_tokens over which the penalty grows."""

    def broken_rules(self) -> Iterator[str]:
        """Yield a line if the penalty would have to begin at a negative length."""
        if self.buffer_tokens > self.max_tokens:
            yield f"buffer_tokens={self.buffer_tokens} must be at most max_tokens={self.max_tokens}: lower it"


class ReasoningGymRewardConfig(_Extracting):
    """The scorer of the reasoning-gym task that made the query. Scorers that execute the response run sandboxed."""

    kind: Literal["reasoning_gym"]
    threshold: float | None = Field(1.0, gt=0, le=1)
    """Value of the scorer from which an answer is correct (1, else 0). null: the value itself, as partial credit."""


class SandboxLimits(Section):
    """Limits of one program in the sandbox."""

    cpu_s: float = Field(5, gt=0)
    """CPU time, in seconds."""
    wall_s: float = Field(8, gt=0)
    """Elapsed time, in seconds. kind: code counts the start of the sandbox, and needs at most verifier.deadline_s."""
    memory_mib: int = Field(512, ge=64)
    """Address space of each of its processes, MiB."""
    max_processes: int = Field(32, ge=1)
    """Processes and threads at the same time."""
    output_kib: int = Field(256, ge=1)
    """Standard output, KiB; the same for each file that the program writes."""


class CodeRewardConfig(_Reward):
    """Runs the response's Python program against the query's test cases, in a bubblewrap sandbox."""

    kind: Literal["code"]
    limits: SandboxLimits = SandboxLimits()
    """Limits for each test case."""
    all_tests: bool = True
    """true: 1 only if all test cases pass. false: the share of test cases that pass."""


class _Remote(_Reward):
    urls: Annotated[tuple[str, ...], Accepts("a list of at least 1 URL, http:// or https://")] = Field(
        min_length=1, repr=False
    )
    """Endpoints, http:// or https://, used in turn; one that fails is passed over."""
    token_env: Annotated[
        Annotated[str, AfterValidator(variable_name)] | None, Accepts("the name of an environment variable or null")
    ] = Field(None, repr=False)
    """Name of the environment variable that holds the bearer token; never the token itself, because configurations end
    up in logs. null: no token."""
    timeout_s: float = Field(30, gt=0)
    """Seconds to wait for one request."""
    max_tries: int = Field(4, ge=1)
    """Attempts per request, with growing pauses, after time-outs, lost connections, 429 and 5xx. Other 4xx fail at
    once."""
    max_concurrency: int = Field(32, ge=1)
    """Concurrent requests of one verifier actor."""

    @field_validator("urls")
    @classmethod
    def _are_http(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            if not re.match(r"https?://[^/@?#\s]+(/[^?#\s]*)?$", url):
                shown = "a URL" if re.search("[@?#]", url) else repr(url)  # what is before @ or after ? may be a secret
                raise ValueError(
                    f"{shown} must be http://host… or https://host…, without user, password or query (?…); give a "
                    "token by token_env"
                )
        return urls


class SandboxFusionRewardConfig(_Remote):
    """Runs the response's program against the query's test cases on SandboxFusion servers (POST /run_code)."""

    kind: Literal["sandbox_fusion"]
    limits: SandboxLimits = SandboxLimits()
    """Limits for each test case, as far as the server's interface has them."""
    all_tests: bool = True
    """true: 1 only if all test cases pass. false: the share of test cases that pass."""

    def broken_rules(self) -> Iterator[str]:
        """Yield a line if requests time out before the programs that they run."""
        if self.timeout_s <= self.limits.wall_s:
            yield (
                f"timeout_s={self.timeout_s:g} must exceed limits.wall_s={self.limits.wall_s:g}, or a program that "
                "loops would count as a server that does not answer; raise it"
            )


class HttpRewardConfig(_Remote):
    """A reward server: POST of query, prompts and labels, answered by rewards (OpenRLHF's format). docs/rewards.md."""

    kind: Literal["http"]
    max_batch: int = Field(16, ge=1)
    """Most responses in one request."""
    max_wait_s: float = Field(0.02, ge=0)
    """Seconds that a response waits for others to share its request. Raise it to send fuller requests."""


class ModelRewardConfig(_Reward):
    """A reward model, served by vLLM's pooling interface in its own actors."""

    kind: Literal["model"]
    path: FolderOrName
    """Folder or hub name of a sequence-classification model with one label. Its raw logit is the score."""
    num_engines: int = Field(1, ge=1)
    """Engines that serve the model. Raise it if groups wait to be scored."""
    max_tokens: int = Field(4096, ge=1)
    """Longest conversation, in tokens; a longer one is cut off at the left."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Number format of the model; its score head is computed in float32 in any case."""
    gpu_memory_utilization: float = Field(0.85, gt=0, lt=1)
    """Share of a GPU's memory that an engine may use (ignored on CPU)."""
    kv_cache_gib: float = Field(1.0, gt=0)
    """Size of an engine's key-value cache on CPU, GiB (ignored on GPUs)."""
    start_deadline_s: float = Field(600, gt=0)
    """Seconds within which an engine must load the model and be ready."""
    timeout_s: float = Field(60, gt=0)
    """Seconds to score one response, over all engines that are tried."""


class PythonRewardConfig(_Reward):
    """A user's function (query: Query, response: Response) -> float, called in isolated worker processes."""

    kind: Literal["python"]
    function: FunctionPath
    """The function."""


class EnvironmentRewardConfig(_Reward):
    """A value that the episode itself returned (docs/environments.md)."""

    kind: Literal["environment"]
    key: str = "reward"
    """Name of the value among those that the episode returned; a single number has the name `reward`."""


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
