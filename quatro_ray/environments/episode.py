"""Plays one episode: passes turns between the environment's process and the engine, and keeps the tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Protocol

from quatro_ray.config import EnvironmentConfig
from quatro_ray.data.chat_template import Tokenizer, encode_given
from quatro_ray.environments.transcript import Transcript
from quatro_ray.failures import EnvironmentFailed
from quatro_ray.isolation.protocol import Message
from quatro_ray.isolation.worker_pool import Exhausted, ProcessPool, Worker, WorkerLost
from quatro_ray.seeding import seed_of
from quatro_ray.timeouts import within
from quatro_ray.types import DropReason, Query, Rollout, SamplingParams, Turn


class Engine(Protocol):
    """The engine that samples the policy's turns."""

    async def complete(self, token_ids: Sequence[int], sampling: SamplingParams, stop: Sequence[str]) -> Rollout:
        """Return the continuation of the tokens; its spans count from the first new token.

        Args:
            token_ids: prompt and response so far.
            sampling: `max_tokens` bounds the continuation.
            stop: strings that end the turn.
        """
        ...


class Episode:
    """One episode. If its process is lost it is played again from the start, and the turns so far are repeated.

    Args:
        prompt_ids: tokens of the query's prompt, [P].
        sampling: `max_tokens` bounds the whole response, including the environment's tokens; `seed` is the episode's.
    """

    def __init__(
        self,
        config: EnvironmentConfig,
        tokenizer: Tokenizer,
        engine: Engine,
        query: Query,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._engine = engine
        self._query = query
        self._sampling = sampling
        self._transcript = Transcript(prompt_ids, sampling.max_tokens)
        self._turns: list[Turn | None] = []
        self._truncated = False

    async def play(self, pool: ProcessPool) -> Rollout:
        """Wait for a free process, play the episode and return its rollout.

        Raises:
            EnvironmentFailed: the function raised, the episode missed its deadline, or a process was lost through no
                fault of the policy.
        """
        try:
            return await pool.use(self._within_deadline)
        except Exhausted as exhausted:
            if self._transcript.num_sampled == 0:  # the policy has said nothing, so it cannot be the cause
                raise EnvironmentFailed(DropReason.ENVIRONMENT_ERROR, f"{exhausted}, before the first turn") from None
            if exhausted.ended_itself and not self._config.sandbox:  # nothing that the policy wrote is executed
                why = f"{exhausted}; the function must not end its process"
                raise EnvironmentFailed(DropReason.ENVIRONMENT_ERROR, why) from None
            return self._transcript.rollout(self._tokenizer, "exhausted", {})
        except WorkerLost as lost:
            raise EnvironmentFailed(DropReason.ENVIRONMENT_ERROR, str(lost)) from lost

    async def _within_deadline(self, worker: Worker) -> Rollout:
        try:
            return await within(self._config.episode_deadline_s, self._play(worker))
        except TimeoutError:
            detail = f"an episode missed episode_deadline_s={self._config.episode_deadline_s:g}"
            raise EnvironmentFailed(DropReason.ENVIRONMENT_TIMEOUT, detail) from None

    async def _play(self, worker: Worker) -> Rollout:
        answer = await self._ask(worker, {"query": asdict(self._query)})
        number = 0
        while "generate" in answer:
            if number == len(self._turns):
                self._turns.append(await self._next_turn(answer["given"], **answer["generate"]))
            turn = self._turns[number]
            answer = await self._ask(worker, {"turn": None if turn is None else asdict(turn)})
            number += 1
        if number < len(self._turns):
            detail = f"played again, the episode took {number} turns instead of {len(self._turns)}"
            raise EnvironmentFailed(DropReason.ENVIRONMENT_ERROR, f"{detail}: it must depend on its arguments alone")
        return self._ended(answer["end"])

    async def _ask(self, worker: Worker, request: Message) -> Message:
        answer = await worker.ask(request, self._config.turn_deadline_s)
        if "error" in answer:
            raise EnvironmentFailed(DropReason.ENVIRONMENT_ERROR, answer["error"])
        return answer

    async def _next_turn(
        self, given: Sequence[tuple[str, str]], stop: Sequence[str], max_tokens: int | None
    ) -> Turn | None:
        """Return the next turn, or None if no turn can follow; then nothing of the context is added either."""
        context = self._encode(given)
        num_left = self._transcript.num_left - len(context)
        if self._truncated or num_left < 1 or len(self._turns) >= self._config.max_turns:
            self._truncated = True
            return None
        self._transcript.give(context)
        return await self._generate(stop, min(num_left, max_tokens or num_left))

    def _encode(self, given: Sequence[tuple[str, str]]) -> list[int]:
        token_ids: list[int] = []
        for text, role in given:
            last = token_ids[-1] if token_ids else self._transcript.last_token
            try:
                token_ids += encode_given(self._tokenizer, self._query.prompt, text, role, last)
            except ValueError as error:
                raise EnvironmentFailed(DropReason.ENVIRONMENT_ERROR, str(error)) from error
        return token_ids

    async def _generate(self, stop: Sequence[str], max_tokens: int) -> Turn:
        number = len(self._turns)
        seed = None if self._sampling.seed is None else seed_of(self._sampling.seed, "turn", number)
        sampling = replace(self._sampling, max_tokens=max_tokens, seed=seed)
        sampled = await self._engine.complete(self._transcript.prefix, sampling, stop)
        self._transcript.add(sampled)
        truncated = sampled.finish_reason == "length"
        self._truncated = truncated and self._transcript.num_left < 1
        return Turn(sampled.text, truncated)

    def _ended(self, environment: Mapping[str, float]) -> Rollout:
        finish_reason = "length" if self._truncated else "stop"
        try:
            return self._transcript.rollout(self._tokenizer, finish_reason, environment)
        except ValueError as error:
            raise EnvironmentFailed(DropReason.ENVIRONMENT_ERROR, f"the episode ended, but {error}") from error
