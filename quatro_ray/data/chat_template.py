"""From a query's prompt, or prompt and response, to tokens; the one place that knows about chat templates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

_CHAT = '[{"role"'
_MARK = "\u2402 turn \u2403"


def encode_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Plain text as it is; chat messages (JSON text, as `chat_prompt` makes it) through the chat template.

    Raises:
        ValueError: the tokenizer has no template, or its template refuses these messages.
    """
    if is_chat(prompt):
        return list(_apply_template(tokenizer, json.loads(prompt), add_generation_prompt=True, return_dict=False))
    return list(tokenizer.encode(prompt))


def encode_conversation(tokenizer: Any, prompt: str, response: str) -> list[int]:
    """Prompt and response as a reward model reads them: a chat through its template with the response as the
    assistant's turn, its end included; else the two texts in one, as they are."""
    if is_chat(prompt):
        messages = [*json.loads(prompt), {"role": "assistant", "content": response}]
        return list(_apply_template(tokenizer, messages, add_generation_prompt=False, return_dict=False))
    return list(tokenizer.encode(prompt + response))


def _apply_template(tokenizer: Any, messages: list[dict[str, Any]], **how: Any) -> Any:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, **how)
    except TemplateError as error:
        raise ValueError(f"the chat template refuses its messages: {error}") from error


def is_chat(prompt: str) -> bool:
    return prompt.startswith(_CHAT)


def chat_prompt(messages: Sequence[dict[str, Any]]) -> str:
    """The messages as text with the keys in the order by which `encode_prompt` knows them."""
    return json.dumps([{"role": m["role"], "content": m["content"]} for m in messages], ensure_ascii=False)


def as_messages(text: str, system_prompt: str | None) -> list[dict[str, Any]]:
    """One user message, after the system's if there is one."""
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    return [*system, {"role": "user", "content": text}]


def encode_given(tokenizer: Any, prompt: str, text: str, role: str, last_token: int | None) -> list[int]:
    """What an environment gives between turns, as the tokens that follow `last_token`, the newest of the response.

    Plain prompts: the text as it is. Chats: the end of the policy's turn, the message and the start of the next turn,
    cut out of what the template makes of a conversation, so that earlier turns stay the tokens that they are.

    Raises:
        ValueError: the template cannot show a message of this role after the assistant's.
    """
    if not is_chat(prompt):
        return list(tokenizer.encode(text, add_special_tokens=False))
    messages = [*json.loads(prompt), {"role": "assistant", "content": _MARK}, {"role": role, "content": text}]
    shown = str(_apply_template(tokenizer, messages, add_generation_prompt=True, tokenize=False))
    _, mark, rest = shown.partition(_MARK)
    if not mark or text.strip() not in rest:
        raise ValueError(f"the chat template shows no message of role {role!r} after the assistant's")
    ended = last_token is not None and last_token in tokenizer.all_special_ids
    if ended and rest.startswith(end := tokenizer.decode([last_token])):
        rest = rest.removeprefix(end)
    return list(tokenizer.encode(rest, add_special_tokens=False))
