"""Small tokenizers of other kinds than CLIP's, in the folders that transformers writes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import Unigram, WordLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import UnigramTrainer, WordLevelTrainer

CAPTIONS = [
    "red apple",
    "green apple on a table",
    "woman firefighter: medium-dark skin tone",
    "flag: Åland Islands",
    "it's twelve o’clock!",
] * 4


def t5_like() -> Tokenizer:
    """Return a Unigram tokenizer framed as T5's: no start token, "</s>" 1 behind, "<pad>" 0."""
    tokenizer = Tokenizer(Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    trainer = UnigramTrainer(
        vocab_size=90,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(CAPTIONS, trainer=trainer)
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def word_level() -> Tokenizer:
    """Return a tokenizer of whole words that puts nothing around a prompt."""
    tokenizer = Tokenizer(WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = WordLevelTrainer(special_tokens=["[UNK]", "[PAD]"], show_progress=False)
    tokenizer.train_from_iterator(CAPTIONS, trainer=trainer)
    return tokenizer


def save(
    tokenizer: Tokenizer,
    folder: Path,
    special_tokens: Mapping[str, str],
    *,
    max_tokens: int,
    padding_side: Literal["left", "right"] = "right",
) -> None:
    """Write a tokenizer as transformers saves it."""
    from transformers import PreTrainedTokenizerFast

    saved = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_tokens,
        padding_side=padding_side,
        **special_tokens,
    )
    saved.save_pretrained(folder)


T5_TOKENS = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
WORD_TOKENS = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
