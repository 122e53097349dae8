"""Prompts and conversations as tokens, with a real tokenizer."""

import pytest

from quatro_ray.chats import chat_prompt
from quatro_ray.data.chat_template import encode_conversation, encode_given, encode_prompt, prompt_tail
from quatro_ray.engines.tiny_tokenizer import make_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</{{ m['role'] }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_conversation_is_its_prompt_and_the_assistants_turn() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    prompt = chat_prompt([{"role": "user", "content": "1+1?"}])
    read = tokenizer.decode(encode_conversation(tokenizer, prompt, ' 2 "two" 东'))
    assert read == '<user>1+1?</user><assistant> 2 "two" 东</assistant>'
    assert read.startswith(tokenizer.decode(encode_prompt(tokenizer, prompt)))


def test_plain_texts_are_put_together_as_they_are() -> None:
    tokenizer = make_tokenizer()
    assert tokenizer.decode(encode_conversation(tokenizer, "1+1=", " 2\n")) == "1+1= 2\n"


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_what_is_given_in_a_chat_ends_the_turn_and_starts_the_next() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "<eos>")
    prompt = chat_prompt([{"role": "user", "content": "1+1?"}])
    asked = "\n<|im_start|>user\nsure?<eos>\n<|im_start|>assistant\n"
    said = tokenizer.encode("2")
    given = encode_given(tokenizer, prompt, "sure?", "user", last_token=tokenizer.eos_token_id)
    assert tokenizer.decode(given) == asked  # the turn ended itself
    cut = encode_given(tokenizer, prompt, "sure?", "user", last_token=said[-1])
    assert tokenizer.decode(cut) == "<eos>" + asked
    whole = chat_prompt(
        [
            {"role": "user", "content": "1+1?"},
            {"role": "assistant", "content": "2"},
            {"role": "user", "content": "sure?"},
        ]
    )
    assert encode_prompt(tokenizer, prompt) + said + cut == encode_prompt(tokenizer, whole)


def test_what_is_given_after_a_plain_prompt_is_the_text_as_it_is() -> None:
    tokenizer = make_tokenizer()
    assert tokenizer.decode(encode_given(tokenizer, "1+1=", " =2;", "tool", last_token=None)) == " =2;"


def test_a_template_that_cannot_show_a_message_is_told() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    prompt = chat_prompt([{"role": "user", "content": "1+1?"}])
    with pytest.raises(ValueError, match="shows no message of role 'tool' after the assistant's"):
        encode_given(tokenizer, prompt, "2", "tool", last_token=None)


@pytest.mark.parametrize(
    ("template", "tail"),
    [
        ("{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}<a>\n<think>\n{% endif %}",
         "<a>\n<think>\n"),
        ("[{{ messages[0].content }}]{% if not add_generation_prompt %}end{% endif %}<think>", "<think>"),
    ],
)  # fmt: skip
def test_the_tail_of_a_prompt_is_what_the_template_adds(template: str, tail: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    assert prompt_tail(tokenizer, chat_prompt([{"role": "user", "content": "q"}])) == tail
    assert prompt_tail(tokenizer, "1+1=<think>\n") == "<think>\n"
    assert prompt_tail(tokenizer, "1+1=") == ""
