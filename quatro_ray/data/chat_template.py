"""Encodes prompts and conversations as tokens; only this module uses chat templates."""

from __future__ import annotations

import re
from typing import Any, Protocol

from quatro_ray.chats import Message, is_chat, messages_of, template_kwargs_of

_TAG_AT_END = re.compile(r"<[A-Za-z][\w-]*>\s*$")
_MARK = "\u2402 turn \u2403"


class Encoder(Protocol):
    """The part of a transformers tokenizer that encodes texts and chats."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the tokens of a text, by default with special tokens such as one at its beginning."""
        ...

    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> Any:
        """Return a conversation in the model's chat format, as tokens or (`tokenize=False`) as text."""
        ...


class Tokenizer(Encoder, Protocol):
    """The part of a transformers tokenizer that this package uses."""

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of special tokens, such as the one that ends a turn."""
        ...

    def decode(self, token_ids: list[int]) -> str:
        """Return the text of the tokens, with special tokens written out."""
        ...


def encode_prompt(tokenizer: Encoder, prompt: str) -> list[int]:
    """Return the tokens of a prompt: plain text as it is, a chat by the chat template.

    Of the special tokens that a tokenizer puts around plain text, those before it are kept unless the text begins with
    them itself, and those after it are left out: the policy would continue after its own end.

    Args:
        tokenizer: that of the policy, whose template renders chats.
        prompt: plain text, or chat messages as the JSON text that `chat_prompt` makes.

    Raises:
        ValueError: the tokenizer has no template, or its template refuses these messages.
    """
    if is_chat(prompt):
        kwargs = template_kwargs_of(prompt)
        messages = messages_of(prompt)
        return list(_apply_template(tokenizer, messages, kwargs, add_generation_prompt=True, return_dict=False))
    before, text, _ = around_text(tokenizer, prompt)
    return text if text[: len(before)] == before else [*before, *text]


def around_text(tokenizer: Encoder, text: str) -> tuple[list[int], list[int], list[int]]:
    """Return the special tokens that a tokenizer puts before a text, the text's own tokens, and those put after it."""
    plain = list(tokenizer.encode(text, add_special_tokens=False))
    whole = list(tokenizer.encode(text))
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], plain, whole[start + len(plain) :]
    return [], whole, []  # the special tokens change how the text is split


def prompt_tail(tokenizer: Encoder, prompt: str) -> str:
    """Return the end of a prompt, which a response continues.

    In a chat this is what the template adds after the last message, such as the role and `<think>`. In plain text it is
    the tag at the end, or "".
    """
    if not is_chat(prompt):
        return _last_tag(prompt)
    messages, kwargs = messages_of(prompt), template_kwargs_of(prompt)
    asked = str(_apply_template(tokenizer, messages, kwargs, add_generation_prompt=True, tokenize=False))
    try:
        plain = str(_apply_template(tokenizer, messages, kwargs, add_generation_prompt=False, tokenize=False))
    except ValueError:  # a template may refuse to end without the assistant's turn
        return _last_tag(asked)
    return asked.removeprefix(plain) if asked.startswith(plain) else _last_tag(asked)


def _last_tag(text: str) -> str:
    found = _TAG_AT_END.search(text[-200:])
    return found[0] if found else ""


def encode_conversation(tokenizer: Encoder, prompt: str, response: str) -> list[int]:
    """Return the tokens of prompt and response as a reward model reads them.

    In a chat the response is the assistant's complete turn, by the chat template; else the two texts are concatenated.
    The chat's own variables for the template are meant for the policy's and are left out.
    """
    if is_chat(prompt):
        messages = [*messages_of(prompt), {"role": "assistant", "content": response}]
        return list(_apply_template(tokenizer, messages, {}, add_generation_prompt=False, return_dict=False))
    return list(tokenizer.encode(prompt + response))


def _apply_template(tokenizer: Encoder, messages: list[Message], kwargs: dict[str, Any], **options: Any) -> Any:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, **kwargs, **options)
    except TemplateError as error:
        raise ValueError(f"the chat template refuses its messages: {error}") from error


def encode_given(tokenizer: Tokenizer, prompt: str, text: str, role: str, last_token: int | None) -> list[int]:
    """Return the tokens of what an environment gives between turns.

    In a plain prompt this is the text as it is. In a chat it is the end of the policy's turn, the message, and the
    start of the next turn. They are cut out of a rendered conversation, so the tokens of earlier turns never change.

    Args:
        tokenizer: that of the policy.
        prompt: the prompt of the query, as `encode_prompt` takes it.
        text: what the environment gives: the content of one message.
        role: role of the message in a chat, such as user; a plain prompt ignores it.
        last_token: newest token of the response, which the result follows; None if the response is empty.

    Raises:
        ValueError: the template cannot render a message of this role after the assistant's.
    """
    if not is_chat(prompt):
        return list(tokenizer.encode(text, add_special_tokens=False))
    messages = [*messages_of(prompt), {"role": "assistant", "content": _MARK}, {"role": role, "content": text}]
    kwargs = template_kwargs_of(prompt)
    shown = str(_apply_template(tokenizer, messages, kwargs, add_generation_prompt=True, tokenize=False))
    _, mark, rest = shown.partition(_MARK)
    if not mark or text.strip() not in rest:
        raise ValueError(f"the chat template shows no message of role {role!r} after the assistant's")
    if last_token is not None and last_token in tokenizer.all_special_ids:
        rest = rest.removeprefix(tokenizer.decode([last_token]))
    return list(tokenizer.encode(rest, add_special_tokens=False))
