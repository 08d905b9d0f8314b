"""What the trainer asks of the family `var`: a new model, and the objective of each phase."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from nsp.config import Config
from nsp.data.dataset import ImageDataset
from nsp.data.sources import ImageSource
from nsp.data.stream import ShardStream
from nsp.errors import ConfigError
from nsp.families.var import tokens
from nsp.families.var.config import TextCondition, VarConfig, with_condition
from nsp.families.var.model import initialize
from nsp.families.var.objective import PredictorObjective, PredictorSettings
from nsp.families.var.system import VarSystem
from nsp.families.var.tokenizer_objective import TokenizerObjective, TokenizerSettings
from nsp.families.var.tokens import is_constant
from nsp.text.encoder import build_text_encoder, load_text_encoder
from nsp.text.tokenizer import PromptTokenizer, train_tokenizer
from nsp.training.objective import Objective, TokenCache

if TYPE_CHECKING:
    from transformers import CLIPTextModel

PHASES = ("tokenizer", "predictor")


@dataclass(frozen=True, kw_only=True)
class TextEncoderSettings(Config):
    """Where the text encoder of a new model comes from: a CLIP folder, or these sizes."""

    folder: str | None = None  # CLIP, or a pipeline with text_encoder/ and tokenizer/
    vocab_size: int = 2048
    depth: int = 2
    num_heads: int = 4


def new_system(
    config: Mapping[str, Any], text_encoder: Mapping[str, Any], source: ImageSource | None
) -> VarSystem:
    """Return a freshly initialised model.

    `text_encoder` holds TextEncoderSettings. A pretrained CLIP folder decides width and length of
    the text condition; otherwise the prompt tokenizer is trained on the captions of `source` and
    the encoder is new. `source` is None for a stream. Weights are drawn from torch's global
    generator, which the caller seeds.
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
    settings: TextEncoderSettings, text: TextCondition, source: ImageSource | None
) -> tuple[PromptTokenizer, "CLIPTextModel"]:
    """Return prompt tokenizer and text encoder, pretrained or new."""
    if settings.folder is not None:
        folder = Path(settings.folder)
        is_pipeline = (folder / "text_encoder").is_dir()
        encoder = load_text_encoder(folder, subfolder="text_encoder" if is_pipeline else None)
        tokenizer = PromptTokenizer.load(folder, subfolder="tokenizer" if is_pipeline else None)
        return tokenizer, encoder
    if source is None:
        raise ConfigError(
            "the captions of a stream are not known ahead, so no prompt tokenizer can be trained "
            "on them; give a CLIP folder with --text-encoder, or a checkpoint with --start-from"
        )
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
    data: ImageDataset | ShardStream,
    held_out: ImageDataset | None = None,
    cache: TokenCache | None = None,
) -> Objective:
    """Return the objective of a phase; raise ConfigError for an unknown one.

    `cache` is where the pictures' tokens are kept, for the phase that needs them.
    """
    if phase not in PHASES:
        raise ConfigError(f"unknown phase {phase!r} of family var; known: {', '.join(PHASES)}")
    if phase == "tokenizer":
        if cache is not None and cache.is_given:
            raise ConfigError(
                f"{cache.file} holds tokens of a finished tokenizer, which this phase would change;"
                " leave it out, or the phase: --from-phase predictor"
            )
        return TokenizerObjective(system, data, held_out, TokenizerSettings.from_dict(settings))
    predictor = PredictorSettings.from_dict(settings)
    return PredictorObjective(system, data, held_out, predictor, cache)


def write_cache(system: VarSystem, data: ImageDataset, file: Path) -> None:
    """Write the tokens of all pictures to `file`, for `data.token_cache` of later runs."""
    if not is_constant(data):
        raise ConfigError("crops and flips change the tokens: only whole pictures can be cached")
    tokens.write_cache(system.vae, data, file)
