"""A byte-level tokenizer for models that are made here: each byte of UTF-8 is a token.

Source: ``tokenizers.pre_tokenizers.ByteLevel``.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

__all__ = ["save_tokenizer"]

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


def save_tokenizer(folder: Path, *, length: int) -> None:
    """Save a tokenizer of 260 tokens: four special tokens, and one for each byte.

    Args:
        folder: where to save it.
        length: the most tokens that the model takes.
    """
    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {word: number for number, word in enumerate(words)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=length,
    ).save_pretrained(str(folder))
