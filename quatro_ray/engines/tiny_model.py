"""A small model of the Qwen2 architecture with random weights, in Hugging Face format."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from quatro_ray.config import TinyModelConfig
from quatro_ray.engines.tiny_tokenizer import MAX_POSITIONS


def make_model(config: TinyModelConfig, tokenizer: Qwen2Tokenizer, seed: int) -> Qwen2ForCausalLM:
    """Return a model with random float32 weights."""
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=4 * config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=max(1, config.num_heads // 2),
            max_position_embeddings=MAX_POSITIONS,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )


def save_pretrained(model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, path: Path) -> None:
    """Write model and tokenizer to a folder, which is created if it does not exist."""
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
