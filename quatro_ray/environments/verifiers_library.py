"""Plays environments of the `verifiers` library (0.1) as episodes, whether they have one turn or several.

The library asks an OpenAI client for completions and sends all messages so far. The client here passes on only what is
new since the last turn, so the policy's earlier turns stay the tokens that it sampled.
"""

from __future__ import annotations

import json
import time
from collections.abc import Coroutine, Mapping, Sequence
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

from quatro_ray.data.verifiers_library import METADATA_KEY, load
from quatro_ray.environments.base import Policy
from quatro_ray.types import Query


def episode(
    query: Query, policy: Policy, *, env: str, args: Mapping[str, Any] | None = None
) -> Coroutine[Any, Any, dict[str, float]]:
    """Return a coroutine that plays one rollout and returns its `reward` and its metrics, by the environment's rubric.

    Args:
        query: one that data/verifiers_library.py made; its metadata holds the row of the library's dataset.
        policy: answers the library's requests for completions.
        env: name of the environment, for verifiers.load_environment.
        args: the environment's own arguments, for verifiers.load_environment.
    """
    return _rollout(_loaded(env, json.dumps(dict(args or {}), sort_keys=True)), query, policy)


@lru_cache(maxsize=1)
def _loaded(env: str, args: str) -> Any:
    return load(env, json.loads(args))


async def _rollout(environment: Any, query: Query, policy: Policy) -> dict[str, float]:
    row = json.loads(query.metadata[METADATA_KEY])
    client = _Client(policy, row["prompt"])
    state = await environment.rollout(row, client, "policy", {})
    if (error := state["error"]) is not None:
        raise RuntimeError(f"the environment failed: {error.__cause__ or error!r}") from error
    await environment.rubric.score_rollout(state)
    return {"reward": float(state["reward"])} | {k: float(v) for k, v in (state["metrics"] or {}).items()}


class _Client:
    """The part of openai.AsyncOpenAI that the library uses; `prompt`: the prompt that the policy already has."""

    def __init__(self, policy: Policy, prompt: Any) -> None:
        self._policy = policy
        self._seen: Any = [_plain(m) for m in prompt] if isinstance(prompt, list) else prompt
        self.chat = SimpleNamespace(completions=SimpleNamespace(create=self._chat))
        self.completions = SimpleNamespace(create=self._completion)

    async def _chat(self, *, messages: Sequence[Mapping[str, Any]], **settings: Any) -> Any:
        from openai.types.chat import ChatCompletion

        plain = [_plain(m) for m in messages]
        for message in self._new(plain):
            self._policy.give(message["content"], message["role"])
        text, reason = self._generate(settings)
        answer = {"role": "assistant", "content": text}
        self._seen = [*plain, answer]
        choice = {"index": 0, "message": answer, "finish_reason": reason}
        return ChatCompletion.model_validate(_envelope("chat.completion", choice))

    async def _completion(self, *, prompt: str, **settings: Any) -> Any:
        from openai.types import Completion

        if new := self._new(prompt):
            self._policy.give(new)
        text, reason = self._generate(settings)
        self._seen = prompt + text
        return Completion.model_validate(
            _envelope("text_completion", {"index": 0, "text": text, "finish_reason": reason, "logprobs": None})
        )

    def _new(self, conversation: Any) -> Any:
        """Return what the conversation has beyond the last turn.

        Raises:
            ValueError: the environment changed earlier turns, whose tokens were sampled and cannot change.
        """
        if conversation[: len(self._seen)] != self._seen:
            raise ValueError(
                "the environment rewrote earlier turns; a rollout is one sequence of tokens that only grows"
            )
        return conversation[len(self._seen) :]

    def _generate(self, settings: Mapping[str, Any]) -> tuple[str, str]:
        stop = settings.get("stop") or []
        turn = self._policy.generate(
            stop=[stop] if isinstance(stop, str) else stop,
            max_tokens=settings.get("max_completion_tokens") or settings.get("max_tokens"),
        )
        if turn is None:
            raise _overlong()
        # the library treats an empty answer as a failure of the server, but the policy may answer nothing
        return turn.text or " ", "length" if turn.truncated else "stop"


def _plain(message: Mapping[str, Any]) -> dict[str, str]:
    if not isinstance(message["content"], str):
        raise ValueError(f"a message of role {message['role']!r} is not plain text; only text is supported")
    return {"role": message["role"], "content": message["content"]}


def _envelope(kind: str, choice: dict[str, Any]) -> dict[str, Any]:
    return {"id": "", "created": int(time.time()), "model": "policy", "object": kind, "choices": [choice]}


def _overlong() -> Exception:
    """Return the error of a server whose context is full; the library then ends the rollout as truncated."""
    import httpx
    from openai import BadRequestError

    request = httpx.Request("POST", "http://localhost/chat/completions")
    response = httpx.Response(400, request=request, text="the maximum context length is reached")
    error: Exception = BadRequestError("no tokens left", response=response, body=None)
    return error
