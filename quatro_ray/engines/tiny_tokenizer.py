"""The tokenizer of tiny models; importing this module loads no torch."""

from __future__ import annotations

from tokenizers import pre_tokenizers
from transformers import Qwen2Tokenizer

PAD, EOS = "<pad>", "<eos>"
MAX_POSITIONS = 512


def make_tokenizer() -> Qwen2Tokenizer:
    """Return a tokenizer with one token per byte: a byte-level BPE without merges, to which no text is unknown.

    The class is the one that `AutoTokenizer` picks for Qwen2 models whatever their files say; a tokenizer of another
    class would be loaded as this one, and encode to other tokens.
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
