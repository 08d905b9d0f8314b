"""What the trainer asks of the family `var`: a new model, and the objective of each phase."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from nsp.data.dataset import ImageDataset
from nsp.data.sources import ImageSource
from nsp.data.stream import ShardStream
from nsp.errors import ConfigError
from nsp.families.var import tokens
from nsp.families.var.config import VarConfig, with_condition
from nsp.families.var.decoder_objective import DecoderObjective, DecoderSettings
from nsp.families.var.model import initialize
from nsp.families.var.objective import PredictorObjective, PredictorSettings
from nsp.families.var.system import VarSystem
from nsp.families.var.tokenizer_objective import TokenizerObjective, TokenizerSettings
from nsp.text.parts import TextEncoderSettings, text_parts
from nsp.training.cache import is_constant
from nsp.training.objective import Objective, TokenCache

PHASES = ("tokenizer", "decoder", "predictor")


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
        tokenizer, encoder = text_parts(
            settings, var_config.text.text_width, var_config.text.max_tokens, source
        )
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
    if phase == "decoder":
        return DecoderObjective(system, data, held_out, DecoderSettings.from_dict(settings))
    predictor = PredictorSettings.from_dict(settings)
    return PredictorObjective(system, data, held_out, predictor, cache)


def write_cache(system: VarSystem, data: ImageDataset, file: Path) -> None:
    """Write the tokens of all pictures to `file`, for `data.token_cache` of later runs."""
    if not is_constant(data):
        raise ConfigError("crops and flips change the tokens: only whole pictures can be cached")
    tokens.write_tokens(system.vae, data, file)
