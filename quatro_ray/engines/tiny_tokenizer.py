"""The tokenizer of tiny models; its import loads no torch."""

from __future__ import annotations

from tokenizers import pre_tokenizers
from transformers import Qwen2Tokenizer

PAD, EOS = "<pad>", "<eos>"
MAX_POSITIONS = 512


def make_tokenizer() -> Qwen2Tokenizer:
    """One token a byte: a byte-level BPE without merges, so that any text is encoded and none is unknown.

    It is of the class that `AutoTokenizer` picks for Qwen2 models whatever their files say; another class
    would come back with this one's rules, and other tokens.
    """
    vocabulary = [PAD, EOS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    return Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(vocabulary)},
        merges=[],
        pad_token=PAD,
        eos_token=EOS,
        unk_token=None,
        model_max_length=MAX_POSITIONS,
    )
