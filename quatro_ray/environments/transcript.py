"""The tokens of one episode as the policy sees them; no sampled token is ever decoded and encoded again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from quatro_ray.data.chat_template import Tokenizer
from quatro_ray.types import Rollout, VersionSpan


class Transcript:
    """The response of an episode, which grows turn by turn.

    Args:
        prompt_ids: tokens of the prompt, [P].
        max_tokens: limit of the response, including the environment's tokens.
    """

    def __init__(self, prompt_ids: Sequence[int], max_tokens: int) -> None:
        self._prompt_ids = list(prompt_ids)
        self._max_tokens = max_tokens
        self._token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._sampled: list[bool] = []
        self._versions: list[int] = []
        self.last_turn = ""

    @property
    def num_left(self) -> int:
        """Number of tokens that the response may still have."""
        return self._max_tokens - len(self._token_ids)

    @property
    def prefix(self) -> list[int]:
        """Prompt and response so far, [P + T], which the engine continues."""
        return self._prompt_ids + self._token_ids

    @property
    def num_sampled(self) -> int:
        """Number of tokens that the policy sampled."""
        return sum(self._sampled)

    @property
    def last_token(self) -> int | None:
        """Newest token of the response; None if it is empty."""
        return self._token_ids[-1] if self._token_ids else None

    def add(self, turn: Rollout) -> None:
        """Append a turn that the policy sampled."""
        self._append(turn.token_ids.tolist(), turn.behavior_logprobs.tolist(), True, turn.versions().tolist())
        self.last_turn = turn.text

    def give(self, token_ids: Sequence[int]) -> None:
        """Append context, which is not trained on; it gets the version of the token before it, which has no effect."""
        version = self._versions[-1] if self._versions else _NONE
        self._append(list(token_ids), [0.0] * len(token_ids), False, [version] * len(token_ids))

    def _append(self, token_ids: list[int], logprobs: list[float], sampled: bool, versions: list[int]) -> None:
        self._token_ids += token_ids
        self._logprobs += logprobs
        self._sampled += [sampled] * len(token_ids)
        self._versions += versions

    def rollout(self, tokenizer: Tokenizer, finish_reason: str, environment: Mapping[str, float]) -> Rollout:
        """Return the rollout.

        Args:
            tokenizer: decodes the transcript.
            finish_reason: see Rollout in types.py.
            environment: the result of the episode, as numbers by name.

        Raises:
            ValueError: the policy has sampled nothing.
        """
        if not any(self._sampled):
            raise ValueError("the policy has sampled nothing")
        return Rollout(
            token_ids=np.asarray(self._token_ids, dtype=np.int32),
            behavior_logprobs=np.asarray(self._logprobs, dtype=np.float32),
            spans=self._spans(),
            text=self.last_turn,
            finish_reason=finish_reason,
            sampled=None if all(self._sampled) else np.asarray(self._sampled),
            transcript=tokenizer.decode(self._token_ids),
            environment=environment,
        )

    def _spans(self) -> tuple[VersionSpan, ...]:
        """Return the spans; context before the first turn gets the version of the first turn."""
        first = next(v for v in self._versions if v != _NONE)
        versions = [first if v == _NONE else v for v in self._versions]
        starts = [i for i, v in enumerate(versions) if i == 0 or v != versions[i - 1]]
        ends = [*starts[1:], len(versions)]
        return tuple(VersionSpan(versions[s], s, e) for s, e in zip(starts, ends, strict=True))


_NONE = -1
