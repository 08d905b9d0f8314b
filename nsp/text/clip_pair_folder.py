"""Two CLIP text encoders as one exportable stage, and where they come from.

Their states stand side by side. What the second one pools is a summary of the prompt; it stands in
one more row behind the states, filled up with zeros, so that a prompt is one tensor everywhere. The
states are those behind the final norm, and the summary is not projected.

There is one tokenizer: both must have the same tokens. They may fill up short prompts with two
tokens, as those of SDXL do, whose second one also reads a written "!" as its filling; here that is
a token of its own for both.

Shapes: N prompts, T tokens, D width of both together, E width of the second encoder.
"""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsp.data.sources import ImageSource
from nsp.errors import CheckpointError, ConfigError
from nsp.text.clip_pair import CLIP_PAIR_TYPE, ClipPair, ClipPairConfig
from nsp.text.encoder import (
    TextEncoderStage,
    build_text_encoder,
    cannot_load,
    check_text_parts,
    clip_config,
    clip_model,
    clip_values,
    load_text_encoder,
    read_encoder_config,
)
from nsp.text.parts import TextEncoderSettings, captions_of
from nsp.text.tokenizer import PromptTokenizer, train_tokenizer
from nsp.values import integer
from nsp.weights.weight_files import find_weights, read_safetensors

if TYPE_CHECKING:
    from transformers import CLIPTextModel

_KIND = "two CLIP text encoders"
_PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


class ClipPairStage(nn.Module):
    """Token ids in, states of both encoders and the summary out."""

    def __init__(self, pair: ClipPair) -> None:
        """Wrap both encoders, sharing their weights."""
        super().__init__()
        self.first, self.second = TextEncoderStage(pair.first), TextEncoderStage(pair.second)
        self.pad_id = pair.config.second_pad_id

    def forward(self, token_ids_NT: Tensor) -> tuple[Tensor]:
        """Return text states (N, T + 1, D); the last row has the summary (E), then zeros."""
        first_NTD, _ = self.first(token_ids_NT)
        ends_NT = self.first.end_positions(token_ids_NT).to(torch.int64)
        behind_NT = (ends_NT.cumsum(1) - ends_NT).bool()
        second_NTE, pooled_NE = self.second(token_ids_NT.masked_fill(behind_NT, self.pad_id))
        states_NTD = torch.cat([first_NTD, second_NTE], -1)
        summary_ND = F.pad(pooled_NE, (0, first_NTD.shape[-1]))
        return (torch.cat([states_NTD, summary_ND[:, None]], 1),)


def joined(first: "CLIPTextModel", second: "CLIPTextModel", *, second_pad_id: int) -> ClipPair:
    """Return both encoders as one model."""
    values = (clip_values(first.config), clip_values(second.config))
    config = ClipPairConfig(first=values[0], second=values[1], second_pad_id=second_pad_id)
    return ClipPair(config, first, second)


def load_clip_pair(folder: Path, *, listed: Collection[str] | None = None) -> ClipPair:
    """Return both encoders of a checkpoint, float32, in eval mode.

    With `listed` only files of those names are read. Raises CheckpointError when a file or a weight
    is missing, corrupt or does not fit.
    """
    values = read_encoder_config(folder, (CLIP_PAIR_TYPE,), kind=_KIND)
    try:
        pad_id = integer("second_pad_id", values.get("second_pad_id"), least=0)
    except ConfigError as error:
        raise cannot_load(folder, error) from error
    state: dict[str, Tensor] = {}
    for path in find_weights(folder, ("model",), what="encoders", listed=listed):
        state |= read_safetensors(path)
    if other := [n for n in state if not n.startswith(("first.", "second."))]:
        raise cannot_load(folder, ConfigError(f"tensor {other[0]} belongs to neither encoder"))
    first, second = (
        clip_model(
            clip_config(values.get(part), folder / part),
            {n.partition(".")[2]: tensor for n, tensor in state.items() if n.startswith(part)},
            folder / part,
        )
        for part in ("first", "second")
    )
    return joined(first, second, second_pad_id=pad_id).eval()


def clip_pair_parts(
    settings: TextEncoderSettings, width: int, max_tokens: int, source: ImageSource | None
) -> tuple[PromptTokenizer, ClipPair]:
    """Return prompt tokenizer and encoders of a new model, pretrained or new; see `text_parts`.

    Pretrained ones come from a pipeline folder like SDXL's. New ones have half of `width` each.
    """
    if settings.folder is not None:
        return _pretrained(Path(settings.folder))
    captions = captions_of(source, "a pipeline folder with two CLIP text encoders")
    tokenizer = train_tokenizer(captions, vocab_size=settings.vocab_size, max_tokens=max_tokens)
    first, second = (
        build_text_encoder(
            tokenizer, width=width // 2, depth=settings.depth, num_heads=settings.num_heads
        )
        for _ in range(2)
    )
    return tokenizer, joined(first, second, second_pad_id=tokenizer.pad_id)


def _pretrained(folder: Path) -> tuple[PromptTokenizer, ClipPair]:
    """Return the parts of a pipeline folder; CheckpointError if there is one of two alone."""
    if missing := [part for part in _PARTS if not (folder / part).is_dir()]:
        raise CheckpointError(
            f"{folder} has no {missing[0]}; a model with two text encoders is begun from a "
            f"pipeline folder with {', '.join(_PARTS)}"
        )
    first, second = (load_text_encoder(folder, subfolder=part) for part in _PARTS[:2])
    tokenizer, other = (PromptTokenizer.load(folder, subfolder=part) for part in _PARTS[2:])
    if not tokenizer.reads_as(other):
        raise CheckpointError(
            f"{folder}: tokenizer and tokenizer_2 have other tokens or lengths; two text encoders "
            "must read the same tokens"
        )
    return tokenizer, joined(first, second, second_pad_id=other.pad_id)


def check_clip_pair(pair: ClipPair, tokenizer: PromptTokenizer) -> None:
    """Raise ConfigError if the encoders and the tokenizer do not belong to one model."""
    for encoder in (pair.first, pair.second):
        width = encoder.config.hidden_size
        check_text_parts(encoder, tokenizer, text_width=width, max_tokens=tokenizer.max_tokens)
