"""The tiny model's files mean the same to everyone who loads them."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from quatro_ray.config import TinyModelConfig
from quatro_ray.engines.tiny_model import make_model, save_pretrained
from quatro_ray.engines.tiny_tokenizer import make_tokenizer
from quatro_ray.orchestrator.resources import num_parameters
from tests.make import config


def test_every_text_survives_saving_and_loading(tmp_path: Path) -> None:
    made = make_tokenizer()
    save_pretrained(make_model(TinyModelConfig(kind="tiny"), made, 0), made, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("12+34=", "say a: b", " two  spaces\n", "naïve 东 🙂"):
        assert made.encode(text) == loaded.encode(text)
        assert len(loaded.encode(text)) == len(text.encode())
        assert loaded.decode(loaded.encode(text)) == text
    assert loaded.eos_token_id == 1 and loaded.pad_token_id == 0


@pytest.mark.parametrize("heads", [2, 4])
def test_the_plan_counts_parameters_exactly(heads: int) -> None:
    model = {"kind": "tiny", "num_layers": 3, "hidden_size": 128, "num_heads": heads}
    made = config(model=model)
    assert isinstance(made.model, TinyModelConfig)
    parameters = make_model(made.model, make_tokenizer(), 0).parameters()
    assert num_parameters(made) == sum(p.numel() for p in parameters)
