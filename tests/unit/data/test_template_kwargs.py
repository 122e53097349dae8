"""Variables for the chat template: every text that is rendered for a prompt has them, and wrong ones are told."""

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from quatro_ray.config import DataConfig, SourceConfig
from quatro_ray.data.chat_template import encode_conversation, encode_given, encode_prompt, prompt_tail
from quatro_ray.data.registry import make_dataset
from quatro_ray.data.template_kwargs import check_template_kwargs
from quatro_ray.engines.tiny_tokenizer import make_tokenizer
from quatro_ray.errors import ConfigError, DataError
from tests.unit.rewards.test_workers import reward_configs

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if thinking is defined and not thinking %}<think></think>{% endif %}"
    "{% endif %}"
)


def data(tmp_path: Path, **settings: Any) -> DataConfig:
    sources = {}
    for name in ("train", "eval"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"prompt": f"{name} {i}", "answer": "1"}) + "\n" for i in range(2)))
        sources[name] = {"mine": {"kind": "jsonl", "path": str(path)} | settings}
    return DataConfig.model_validate(sources)


def test_all_that_is_rendered_for_a_prompt_has_them(tmp_path: Path) -> None:
    config = data(tmp_path, as_chat=True, chat_template_kwargs={"thinking": False})
    prompt = make_dataset(config, reward_configs(answer={"kind": "exact"})).train["mine"][0].prompt
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    check_template_kwargs(config, tokenizer)
    assert tokenizer.decode(encode_prompt(tokenizer, prompt)) == "<user>train 0</user><assistant><think></think>"
    assert prompt_tail(tokenizer, prompt) == "<assistant><think></think>"
    given = encode_given(tokenizer, prompt, "sure?", "user", last_token=None)
    assert tokenizer.decode(given) == "</assistant><user>sure?</user><assistant><think></think>"
    # a reward model has a template of its own
    assert (
        tokenizer.decode(encode_conversation(tokenizer, prompt, "2")) == "<user>train 0</user><assistant>2</assistant>"
    )


def test_a_question_is_held_out_whatever_its_variables(tmp_path: Path) -> None:
    config = data(tmp_path, as_chat=True, chat_template_kwargs={"thinking": False}).model_dump(mode="json")
    config["train"]["mine"] = config["eval"]["mine"] | {"chat_template_kwargs": {}}
    with pytest.raises(DataError, match=r"data\.train\.mine: 2 prompts are also in data\.eval"):
        make_dataset(DataConfig.model_validate(config), reward_configs(answer={"kind": "exact"}))


def test_wrong_ones_are_told(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    unknown = data(tmp_path, as_chat=True, chat_template_kwargs={"thinkng": False})
    with pytest.raises(ConfigError, match=r"data\.train\.mine\.chat_template_kwargs\.thinkng=False: .* no variable"):
        check_template_kwargs(unknown, tokenizer)
    plain = data(tmp_path, chat_template_kwargs={"thinking": False})
    with pytest.raises(ConfigError, match=r"data\.train\.mine\.chat_template_kwargs=.*train\.mine:0 is plain text"):
        make_dataset(plain, reward_configs(answer={"kind": "exact"}))
    adapter: TypeAdapter[SourceConfig] = TypeAdapter(SourceConfig)
    with pytest.raises(ValueError, match="tokenize: set by quatro_ray for each prompt"):
        adapter.validate_python({"kind": "jsonl", "path": "x", "chat_template_kwargs": {"tokenize": False}})
