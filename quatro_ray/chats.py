"""The text form of prompts that are chats: `Query.prompt` is plain text, or a chat as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

Message = dict[str, Any]
"""A chat message: its role and its content."""
_MESSAGES, _KWARGS = "messages", "chat_template_kwargs"
_CHAT = '[{"role"'
_CHAT_WITH_KWARGS = f'{{"{_MESSAGES}": [{{"role"'


def chat_prompt(messages: Sequence[Message], template_kwargs: Mapping[str, Any] | None = None) -> str:
    """Return a chat as the text of a prompt; the order of its keys is what `is_chat` recognises.

    Args:
        messages: role and content of each are kept.
        template_kwargs: variables for the chat template, such as enable_thinking; they stay with the prompt.
    """
    kept = [{"role": m["role"], "content": m["content"]} for m in messages]
    return json.dumps(
        {_MESSAGES: kept, _KWARGS: dict(template_kwargs)} if template_kwargs else kept, ensure_ascii=False
    )


def as_messages(text: str, system_prompt: str | None) -> list[Message]:
    """Return one user message, after a system message if there is a system prompt."""
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    return [*system, {"role": "user", "content": text}]


def is_chat(prompt: str) -> bool:
    """Return whether the prompt is the text of a chat."""
    return prompt.startswith((_CHAT, _CHAT_WITH_KWARGS))


def messages_of(prompt: str) -> list[Message]:
    """Return the messages of a prompt that is a chat."""
    chat = json.loads(prompt)
    messages: list[Message] = chat[_MESSAGES] if isinstance(chat, dict) else chat
    return messages


def template_kwargs_of(prompt: str) -> dict[str, Any]:
    """Return the variables for the chat template that a chat brings with it; empty if it brings none."""
    chat = json.loads(prompt)
    kwargs: dict[str, Any] = chat[_KWARGS] if isinstance(chat, dict) else {}
    return kwargs
