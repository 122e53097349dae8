"""One BOS at most, no EOS after a prompt, and both are told."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from quatro_ray.chats import chat_prompt
from quatro_ray.data.chat_template import encode_prompt
from quatro_ray.data.dataset import Dataset
from quatro_ray.data.special_tokens import special_token_notes
from quatro_ray.engines.tiny_tokenizer import make_tokenizer
from quatro_ray.types import Query

PAD, EOS = 0, 1


def tokenizer(template: str) -> Any:
    """The tiny tokenizer, which puts special tokens around texts; <pad> stands for BOS."""
    made = make_tokenizer()
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[("<pad>", PAD), ("<eos>", EOS)]
    )
    return made


def notes(template: str, prompt: str, bos_token_id: int | None) -> str:
    query = Query("q", prompt, "1")
    return "\n".join(special_token_notes(Dataset({"mine": [query]}, {}, {}, {}), tokenizer(template), bos_token_id))


@pytest.mark.parametrize("template", ["$A", "<pad> $A", "$A <eos>", "<pad> $A <eos>"])
@pytest.mark.parametrize("prompt", ["ab", "<pad>ab"])
def test_one_bos_and_no_eos(template: str, prompt: str) -> None:
    plain = make_tokenizer().encode("ab")
    wanted = [PAD, *plain] if "<pad>" in template + prompt else plain
    assert encode_prompt(tokenizer(template), prompt) == wanted


@pytest.mark.parametrize(
    ("template", "prompt", "bos_token_id", "expected"),
    [
        ("$A <eos>", "ab", None, "tokenizer: it puts '<eos>' after texts; it is left out of prompts"),
        ("<pad> $A", "<pad>ab", PAD, "data: prompts begin with '<pad>' already, so the tokenizer's own is left out"),
        ("$A", "ab", PAD, "tokenizer: prompts do not begin with '<pad>', the BOS token of the model's"),
    ],
)
def test_what_is_unexpected_is_told(template: str, prompt: str, bos_token_id: int | None, expected: str) -> None:
    found = notes(template, prompt, bos_token_id)
    assert found.startswith(expected) and "\n" not in found


@pytest.mark.parametrize(("template", "bos_token_id"), [("$A", None), ("<pad> $A", PAD)])
def test_what_is_right_is_not_told(template: str, bos_token_id: int | None) -> None:
    assert notes(template, "ab", bos_token_id) == ""


def test_a_chat_without_bos_is_told() -> None:
    made = tokenizer("<pad> $A")
    made.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    dataset = Dataset({"mine": [Query("q", chat_prompt([{"role": "user", "content": "a"}]), "1")]}, {}, {}, {})
    (line,) = special_token_notes(dataset, made, PAD)
    assert "do not begin with '<pad>'" in line
