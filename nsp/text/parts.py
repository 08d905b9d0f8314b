"""The text parts of a new model: pretrained, or created for its training captions."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nsp.config import Config
from nsp.data.sources import ImageSource
from nsp.errors import ConfigError
from nsp.text.encoder import build_text_encoder, load_text_encoder
from nsp.text.tokenizer import PromptTokenizer, train_tokenizer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import CLIPTextModel


logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TextEncoderSettings(Config):
    """The source of a new model's text encoder: a folder, or these sizes."""

    # CLIP or T5, as the family needs, or a pipeline with text_encoder/ and tokenizer/
    folder: str | None = None
    tokenizer: str | None = None  # folder of a new encoder's tokenizer; None: trained on captions
    vocab_size: int = 2048
    depth: int = 2
    num_heads: int = 4

    def __post_init__(self) -> None:
        """Check the sizes."""
        self.check_counts("text_encoder", "vocab_size", "depth", "num_heads")


def text_parts(
    settings: TextEncoderSettings, width: int, max_tokens: int, source: ImageSource | None
) -> tuple[PromptTokenizer, "CLIPTextModel"]:
    """Return prompt tokenizer and text encoder, pretrained or new.

    A new encoder has `width` channels, and its tokenizer, with `max_tokens` per prompt, is trained
    on the captions of `source`; if that has none, it knows only bytes. Pretrained ones have their
    own width and length, and so has a tokenizer given by folder its length. Raises ConfigError for
    a new one if `source` is None, which means a stream, whose captions are not known.
    """
    if settings.folder is not None:
        folder = Path(settings.folder)
        is_pipeline = (folder / "text_encoder").is_dir()
        encoder = load_text_encoder(folder, subfolder="text_encoder" if is_pipeline else None)
        tokenizer = PromptTokenizer.load(folder, subfolder="tokenizer" if is_pipeline else None)
        return tokenizer, encoder
    if settings.tokenizer is not None:
        tokenizer = PromptTokenizer.load(Path(settings.tokenizer))
    else:
        captions = captions_of(source, "a CLIP folder")
        tokenizer = train_tokenizer(captions, vocab_size=settings.vocab_size, max_tokens=max_tokens)
    encoder = build_text_encoder(
        tokenizer, width=width, depth=settings.depth, num_heads=settings.num_heads
    )
    return tokenizer, encoder


def captions_of(source: ImageSource | None, instead: str) -> list[str]:
    """Return the captions to train a new prompt tokenizer on; a warning if there are none.

    Raises ConfigError for a stream (None); `instead` is what --text-encoder takes, in words.
    """
    if source is None:
        raise ConfigError(
            "a stream's captions are not known in advance, so no prompt tokenizer can be trained "
            f"on them; give {instead} with --text-encoder, or a checkpoint with --start-from"
        )
    captions = sorted({caption for sample in source.samples for caption in sample.captions})
    if source.samples and not captions:
        logger.warning(
            "no captions: the new model's prompt tokenizer knows only single letters; for a model "
            "that will learn from captions later, give %s with --text-encoder",
            instead,
        )
        captions = ["a"]
    return captions


def without_tokens(
    token_ids_BT: "Tensor", dropped_BT: "Tensor", tokenizer: PromptTokenizer
) -> "Tensor":
    """Return prompts (B, T) without the tokens marked in `dropped_BT` (bool), the rest moved up.

    Start and end tokens stay.
    """
    special_BT = token_ids_BT == tokenizer.bos_id
    for token in (tokenizer.eos_id, tokenizer.pad_id):
        special_BT |= token_ids_BT == token
    gone_BT = dropped_BT & ~special_BT
    order_BT = gone_BT.int().argsort(dim=1, stable=True)  # kept tokens first, in their order
    return token_ids_BT.gather(1, order_BT).masked_fill(
        gone_BT.gather(1, order_BT), tokenizer.pad_id
    )
