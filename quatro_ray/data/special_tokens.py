"""Finds what a tokenizer puts around prompts that a user may not expect."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from quatro_ray.chats import is_chat
from quatro_ray.data.chat_template import Tokenizer, around_text, encode_prompt
from quatro_ray.data.dataset import Dataset


def special_token_notes(dataset: Dataset, tokenizer: Tokenizer, bos_token_id: object) -> Iterator[str]:
    """Yield a line for each finding, by the first prompt of the data.

    Args:
        dataset: its first training prompt is looked at.
        tokenizer: that of the policy.
        bos_token_id: the token that begins a text, as the model's configuration names it; no integer: none.
    """
    prompt = next(chain.from_iterable(dataset.train.values())).prompt
    if not is_chat(prompt):
        before, text, after = around_text(tokenizer, prompt)
        if after:
            yield (
                f"tokenizer: it puts {tokenizer.decode(after)!r} after texts; it is left out of prompts, because the "
                "policy would continue after its own end"
            )
        if before and text[: len(before)] == before:
            yield f"data: prompts begin with {tokenizer.decode(before)!r} already, so the tokenizer's own is left out"
    first = encode_prompt(tokenizer, prompt)[:1]
    if isinstance(bos_token_id, int) and first != [bos_token_id]:
        yield (
            f"tokenizer: prompts do not begin with {tokenizer.decode([bos_token_id])!r}, the BOS token of the model's "
            f"configuration (bos_token_id={bos_token_id}): a model that was trained with it answers nonsense without; "
            "put it into the chat template, or set add_bos_token in the tokenizer's files (Qwen's models need none)"
        )
