"""What the trainer asks of the family `var`: a new model, and the objective of each phase."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from nsp.config import Config
from nsp.data.dataset import ImageDataset
from nsp.data.sources import ImageSource
from nsp.errors import ConfigError
from nsp.families.var.config import TextCondition, VarConfig, with_condition
from nsp.families.var.model import initialize
from nsp.families.var.objective import (
    PredictorObjective,
    PredictorSettings,
    TokenizerObjective,
    TokenizerSettings,
)
from nsp.families.var.system import VarSystem
from nsp.text.encoder import build_text_encoder, load_text_encoder
from nsp.text.tokenizer import PromptTokenizer, train_tokenizer
from nsp.training.objective import Objective

if TYPE_CHECKING:
    from transformers import CLIPTextModel

PHASES: Mapping[str, tuple[Callable[..., Objective], type[Config]]] = {
    "tokenizer": (TokenizerObjective, TokenizerSettings),
    "predictor": (PredictorObjective, PredictorSettings),
}


@dataclass(frozen=True, kw_only=True)
class TextEncoderSettings(Config):
    """Where the text encoder of a new model comes from: a CLIP folder, or these sizes."""

    folder: str | None = None  # CLIP, or a pipeline with text_encoder/ and tokenizer/
    vocab_size: int = 2048
    depth: int = 2
    num_heads: int = 4


def new_system(
    config: Mapping[str, Any], text_encoder: Mapping[str, Any], source: ImageSource
) -> VarSystem:
    """Return a freshly initialised model.

    `text_encoder` holds TextEncoderSettings. A pretrained CLIP folder decides width and length of
    the text condition; otherwise the prompt tokenizer is trained on the captions of `source` and
    the encoder is new. Weights are drawn from torch's global generator, which the caller seeds.
    """
    var_config = VarConfig.from_dict(config)
    encoder, tokenizer = None, None
    if var_config.text is not None:
        settings = TextEncoderSettings.from_dict(text_encoder)
        tokenizer, encoder = _text_parts(settings, var_config.text, source)
        text = dataclasses.replace(
            var_config.text,
            text_width=encoder.config.hidden_size,
            max_tokens=tokenizer.max_tokens,
        )
        var_config = with_condition(var_config, text)
    system = VarSystem(var_config, text_encoder=encoder, prompt_tokenizer=tokenizer)
    initialize(system.predictor)
    bound = 1 / var_config.vae.latent_channels**0.5
    nn.init.uniform_(system.vae.quantize.embedding.weight, -bound, bound)
    return system


def _text_parts(
    settings: TextEncoderSettings, text: TextCondition, source: ImageSource
) -> tuple[PromptTokenizer, "CLIPTextModel"]:
    """Return prompt tokenizer and text encoder, pretrained or new."""
    if settings.folder is not None:
        folder = Path(settings.folder)
        is_pipeline = (folder / "text_encoder").is_dir()
        encoder = load_text_encoder(folder, subfolder="text_encoder" if is_pipeline else None)
        tokenizer = PromptTokenizer.load(folder, subfolder="tokenizer" if is_pipeline else None)
        return tokenizer, encoder
    captions = sorted({sample.caption for sample in source.samples})
    tokenizer = train_tokenizer(
        captions, vocab_size=settings.vocab_size, max_tokens=text.max_tokens
    )
    encoder = build_text_encoder(
        tokenizer, width=text.text_width, depth=settings.depth, num_heads=settings.num_heads
    )
    return tokenizer, encoder


def objective(
    phase: str,
    settings: Mapping[str, Any],
    system: VarSystem,
    data: ImageDataset,
    held_out: ImageDataset | None = None,
) -> Objective:
    """Return the objective of a phase; raise ConfigError for an unknown one."""
    if phase not in PHASES:
        raise ConfigError(f"unknown phase {phase!r} of family var; known: {', '.join(PHASES)}")
    make, record = PHASES[phase]
    return make(system, data, held_out, record.from_dict(settings))
