"""The data that generators, verifiers, buffer and learner exchange. Frozen, with the shape of every field.

Shape letters: G rollouts of a query, P prompt tokens, T response tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray


class GroupState(StrEnum):
    """The life cycle of a group: pending → ready → leased → trained | dropped."""

    PENDING = "pending"  # to be generated and scored; the controller knows which ones are in progress
    READY = "ready"
    LEASED = "leased"
    TRAINED = "trained"
    DROPPED = "dropped"


class DropReason(StrEnum):
    """Why a group was dropped. Every dropped group has one reason, and each reason is counted."""

    STALE = "stale"  # older than max_staleness when it was to be leased
    GENERATOR_ERROR = "generator_error"  # the engine failed on it, retries included
    ENVIRONMENT_ERROR = "environment_error"  # the environment failed, retries included
    ENVIRONMENT_TIMEOUT = "environment_timeout"  # an episode missed its deadline, retries included
    QUARANTINED = "quarantined"  # engines died, again and again, while they worked on it
    VERIFIER_TIMEOUT = "verifier_timeout"  # the verifier pool did not answer, retries included
    VERIFIER_ERROR = "verifier_error"  # the verifier itself failed, retries included
    NO_VERDICT = "no_verdict"  # a user's reward returned None, retries included
    ZERO_VARIANCE = "zero_variance"  # filters.drop_zero_variance
    TOO_HARD = "too_hard"  # filters.min_mean_reward
    TOO_EASY = "too_easy"  # filters.max_mean_reward
    OVERLONG = "overlong"  # filters.max_truncated_share
    RUN_ENDED = "run_ended"  # admitted ahead of the learner and not needed when the run ended


class Outcome(StrEnum):
    """How the scoring of one rollout ended."""

    OK = "ok"
    EXHAUSTED = "exhausted"  # the answer itself used up its limits twice, the second time alone
    UNREADABLE = "unreadable"  # the scorer raised on the answer, twice, but scores the expected one: that reward is 0
    TIMEOUT = "timeout"  # the machinery's fault: never a reward
    ERROR = "error"  # the machinery's fault: never a reward


@dataclass(frozen=True)
class Query:
    """One prompt with what its rewards need.

    Attributes:
        query_id: unique within a run.
        prompt: the text that the policy continues.
        answer: the label, for rewards that compare with one.
        metadata: the row's other columns, for rewards and environments, as JSON values.
        source: name of its data source in the configuration.
    """

    query_id: str
    prompt: str
    answer: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""


@dataclass(frozen=True)
class Response:
    """The view of a rollout that rewards get.

    Attributes:
        text: text of the policy; if there are several turns, the last one.
        num_tokens: tokens that the policy sampled, in all turns.
        truncated: a limit of tokens or turns ended it, not the policy.
        transcript: all turns and the environment's text between them; empty if there is no environment.
        environment: values that the episode returned, by name.
        exhausted: the episode exceeded its resource limits twice, so it returned nothing.
        prompt_tail: end of the prompt that the response continues: what the chat template added after the last
            message, such as `<think>` after the role, or the tag that a plain prompt ends with.
    """

    text: str
    num_tokens: int
    truncated: bool
    transcript: str = ""
    environment: Mapping[str, float] = field(default_factory=dict)
    exhausted: bool = False
    prompt_tail: str = ""


@dataclass(frozen=True)
class Turn:
    """One turn of the policy in an episode; `truncated` if a token limit ended it, not the policy or a stop string."""

    text: str
    truncated: bool


@dataclass(frozen=True)
class Score:
    """The result of scoring one rollout.

    Attributes:
        reward: weighted sum of all rewards that apply to the query; meaningful only for outcomes ok and exhausted.
        detail: why the outcome is not ok.
        reward_values: value of each reward by its name in the configuration, before its weight.
        printed: what user functions printed, cut after some lines.
    """

    reward: float
    outcome: Outcome = Outcome.OK
    detail: str = ""
    reward_values: Mapping[str, float] = field(default_factory=dict)
    printed: str = ""


@dataclass(frozen=True)
class VersionSpan:
    """Response tokens [start, end) were sampled under policy `version`."""

    version: int
    start: int
    end: int


@dataclass(frozen=True)
class Rollout:
    """One sampled response.

    Attributes:
        token_ids: int32 [T], the response; includes the end-of-sequence token if one was sampled.
        behavior_logprobs: float32 [T], nats, under the distribution the token was sampled from; 0 if not sampled.
        spans: contiguous, covering [0, T).
        text: text of the policy; if there are several turns, the last one.
        finish_reason: "stop"; "length" if a limit of tokens or turns ended it; "exhausted", see Response.
        score: None until it is scored.
        sampled: bool [T], False for tokens of the environment between turns, which are context and not trained on.
            If None, all tokens were sampled.
        transcript: see Response.
        environment: see Response.
    """

    token_ids: NDArray[np.int32]
    behavior_logprobs: NDArray[np.float32]
    spans: tuple[VersionSpan, ...]
    text: str
    finish_reason: str
    score: Score | None = None
    sampled: NDArray[np.bool_] | None = None
    transcript: str = ""
    environment: Mapping[str, float] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Length T of the response, tokens of the environment included."""
        return len(self.token_ids)

    @property
    def num_sampled(self) -> int:
        """Number of tokens that the policy sampled."""
        return self.num_tokens if self.sampled is None else int(self.sampled.sum())

    @property
    def num_turns(self) -> int:
        """Number of the policy's turns, which are maximal runs of sampled tokens."""
        if self.sampled is None:
            return 1
        return int(self.sampled[0]) + int((self.sampled[1:] & ~self.sampled[:-1]).sum())

    def is_sampled(self) -> NDArray[np.bool_]:
        """Return bool [T]: True if the policy sampled the token."""
        return np.ones(self.num_tokens, dtype=np.bool_) if self.sampled is None else self.sampled

    @property
    def truncated(self) -> bool:
        """Whether a limit of tokens or turns ended it."""
        return self.finish_reason == "length"

    @property
    def response(self) -> Response:
        """The rollout as rewards see it."""
        return Response(
            self.text,
            self.num_sampled,
            truncated=self.truncated,
            transcript=self.transcript,
            environment=self.environment,
            exhausted=self.finish_reason == "exhausted",
        )

    def versions(self) -> NDArray[np.int64]:
        """Return int64 [T]: the policy version that sampled each token, -1 for tokens that were not sampled."""
        out = np.empty(self.num_tokens, dtype=np.int64)
        for span in self.spans:
            out[span.start : span.end] = span.version
        return np.where(self.is_sampled(), out, -1)


@dataclass(frozen=True)
class RolloutGroup:
    """The G rollouts of one query.

    Attributes:
        prompt_token_ids: int32 [P].
        prompt_tail: see Response; needed until the group is scored, and not kept in the ledger.
    """

    group_id: int
    query: Query
    prompt_token_ids: NDArray[np.int32]
    rollouts: tuple[Rollout, ...]
    prompt_tail: str = ""

    def responses(self) -> tuple[Response, ...]:
        """Return the rollouts as rewards see them, [G]."""
        return tuple(replace(rollout.response, prompt_tail=self.prompt_tail) for rollout in self.rollouts)

    def rewards(self) -> NDArray[np.float64]:
        """Return float64 [G]. Raises ValueError if a rollout has no score yet."""
        if any(r.score is None for r in self.rollouts):
            raise ValueError(f"group {self.group_id} has rollouts without a score")
        return np.array([r.score.reward for r in self.rollouts if r.score], dtype=np.float64)

    @property
    def num_tokens(self) -> int:
        """Number of tokens that the policy sampled, in all rollouts."""
        return sum(r.num_sampled for r in self.rollouts)

    def summary(self) -> GenerationSummary:
        """Return what the controller records of a generated group."""
        return GenerationSummary(
            num_tokens=self.num_tokens,
            multi_version_rollouts=sum(len({s.version for s in r.spans}) > 1 for r in self.rollouts),
        )

    def versions(self) -> set[int]:
        """Return the policy versions that sampled its tokens."""
        return {s.version for r in self.rollouts for s in r.spans}


@dataclass(frozen=True)
class GenerationSummary:
    """The counts of a generated group that the controller records; it never sees the group itself.

    Attributes:
        num_tokens: tokens that the policy sampled, in all rollouts.
        multi_version_rollouts: number of rollouts whose tokens were sampled under more than one policy version.
    """

    num_tokens: int
    multi_version_rollouts: int


@dataclass(frozen=True)
class GroupSummary:
    """The scores and counts of a scored group that the controller and evaluation need; the tokens stay behind.

    All sequences are in the order of the group's rollouts.

    Attributes:
        rewards: [G], the weighted sum of each rollout's rewards.
        reward_values: [G], the value of each reward by its name in the configuration, before its weight.
        outcomes: number of rollouts by Outcome; every outcome is a key.
        answers: [G], text of the extracted answer, at most 200 characters; None if the response has no answer.
        correct: [G], True if the first reward in the configuration that applies to the query gave at least 1.
        truncated: number of rollouts that met a limit of tokens or turns.
        turns: [G], turns of the policy.
        response_tokens: [G], tokens that the policy sampled.
        notes: what notes.log tells of the scoring: what user functions printed, and answers that no scorer could read.
    """

    rewards: tuple[float, ...]
    reward_values: tuple[Mapping[str, float], ...]
    outcomes: Mapping[str, int]
    answers: tuple[str | None, ...]
    correct: tuple[bool, ...]
    truncated: int
    turns: tuple[int, ...]
    response_tokens: tuple[int, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class EngineLoad:
    """The work of an engine at one moment.

    Attributes:
        num_running: groups, and turns of episodes, that are being generated now.
        num_generated_tokens: response tokens of finished groups, since the engine started.
        num_sampled_tokens: response tokens sampled since the engine started, unfinished groups included.
        is_alive: False if the engine's own process is gone.
        kv_cache_usage: share of the key-value cache that requests hold, at the engine's last step.
        num_draft_tokens: tokens that speculative decoding proposed, since the engine started.
        num_accepted_tokens: those of them that were sampled.
    """

    num_running: int
    num_generated_tokens: int
    num_sampled_tokens: int
    is_alive: bool
    kv_cache_usage: float = 0.0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0


@dataclass(frozen=True)
class Installed:
    """How an engine took new weights.

    Attributes:
        version: version of the weights that the engine's own process reports.
        num_in_flight: groups, and turns of episodes, that were paused meanwhile.
        pause_s: time during which generation was paused, seconds.
    """

    version: int
    num_in_flight: int
    pause_s: float


@dataclass(frozen=True)
class SamplingParams:
    """How responses are sampled. Behaviour log-probs refer to exactly this distribution."""

    temperature: float
    top_p: float
    max_tokens: int
    seed: int | None


@dataclass(frozen=True)
class MicroBatch:
    """Whole rollouts packed into one row of N tokens for one rank; padding rows belong to sequence -1.

    Attributes:
        token_ids: int64 [N], inputs.
        position_ids: int64 [N], starting at 0 for each sequence (this is what separates them).
        target_ids: int64 [N], the next token; 0 if not `is_response`.
        is_response: bool [N], True if the policy sampled the target.
        rollout_index: int64 [N], row into the step's flat [Q*G] list of rollouts, -1 for padding.
        behavior_logprobs: float32 [N], nats; 0 if not `is_response`.
        staleness: int64 [N], optimiser steps since the policy that sampled the target; 0 if not `is_response`.
    """

    token_ids: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    target_ids: NDArray[np.int64]
    is_response: NDArray[np.bool_]
    rollout_index: NDArray[np.int64]
    behavior_logprobs: NDArray[np.float32]
    staleness: NDArray[np.int64]


RowLayout = Literal["packed", "padded"]
"""How the sequences of a row reach the model: packed behind each other, or padded, one sequence a row of its own."""


@dataclass(frozen=True)
class LearnerBatch:
    """One batch as one rank gets it: its own micro-batches, and what it must know of all others.

    Every rank has the same number of micro-batches, by construction. A cell is the place of a rollout in the flat
    [Q*G] list; M counts the response tokens of all ranks, those of rank 0 first, in the order of their rows.

    Attributes:
        micro_batches: those of this rank.
        cells: the cells in each row of every rank, [ranks][micro-batches][rollouts].
        rewards: float64 [Q, G].
        valid: bool [Q, G], False for the missing rollouts of a group smaller than G.
        num_row_tokens: int64 [Q, G], what each rollout takes up in a row.
        num_response_tokens: int64 [Q, G].
        rollout_index: int64 [M], cells.
        staleness: int64 [M], optimiser steps.
        rows_per_minibatch: micro-batches of a rank that each optimiser step takes, in order.
    """

    micro_batches: tuple[MicroBatch, ...]
    cells: tuple[tuple[tuple[int, ...], ...], ...]
    rewards: NDArray[np.float64]
    valid: NDArray[np.bool_]
    num_row_tokens: NDArray[np.int64]
    num_response_tokens: NDArray[np.int64]
    rollout_index: NDArray[np.int64]
    staleness: NDArray[np.int64]
    rows_per_minibatch: tuple[int, ...]

    def of_rows(self, chosen: slice) -> NDArray[np.bool_]:
        """Return which rollouts are in the chosen rows of all ranks, bool [Q, G]."""
        found = np.zeros_like(self.valid)
        found.flat[[cell for of_rank in self.cells for row in of_rank[chosen] for cell in row]] = True
        return found

    def minibatches(self) -> Iterator[slice]:
        """Yield the micro-batches, of every rank, that each optimiser step takes."""
        start = 0
        for num_rows in self.rows_per_minibatch:
            yield slice(start, start + num_rows)
            start += num_rows


StepMetrics = dict[str, float | list[float] | dict[int, int] | None]
"""Metrics of one optimiser step by area/name. Lists hold values per query or bin; None means there was nothing to
measure."""
