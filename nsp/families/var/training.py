"""What the trainer asks of the family `var`: a new model, and the objective of each phase."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from nsp.config import Config
from nsp.data.dataset import ImageDataset
from nsp.data.sources import ImageSource
from nsp.errors import ConfigError
from nsp.families.var.config import VarConfig
from nsp.families.var.model import initialize
from nsp.families.var.objective import (
    PredictorObjective,
    PredictorSettings,
    TokenizerObjective,
    TokenizerSettings,
)
from nsp.families.var.system import VarSystem
from nsp.text.encoder import build_text_encoder
from nsp.text.tokenizer import train_tokenizer
from nsp.training.objective import Objective

PHASES: Mapping[str, tuple[Callable[..., Objective], type[Config]]] = {
    "tokenizer": (TokenizerObjective, TokenizerSettings),
    "predictor": (PredictorObjective, PredictorSettings),
}


def new_system(
    config: Mapping[str, Any], text_encoder: Mapping[str, Any], source: ImageSource
) -> VarSystem:
    """Return a freshly initialised model.

    A text-conditional one gets a prompt tokenizer trained on the captions of `source` and a new
    CLIP encoder; `text_encoder` holds `vocab_size`, `depth` and `num_heads` of both. Weights are
    drawn from torch's global generator, which the caller seeds.
    """
    var_config = VarConfig.from_dict(config)
    encoder, tokenizer = None, None
    if var_config.text is not None:
        captions = sorted({sample.caption for sample in source.samples})
        settings = dict(text_encoder)
        tokenizer = train_tokenizer(
            captions,
            vocab_size=settings.pop("vocab_size"),
            max_tokens=var_config.text.max_tokens,
        )
        encoder = build_text_encoder(tokenizer, width=var_config.text.text_width, **settings)
    system = VarSystem(var_config, text_encoder=encoder, prompt_tokenizer=tokenizer)
    initialize(system.predictor)
    bound = 1 / var_config.vae.latent_channels**0.5
    nn.init.uniform_(system.vae.quantize.embedding.weight, -bound, bound)
    return system


def objective(
    phase: str, settings: Mapping[str, Any], system: VarSystem, data: ImageDataset
) -> Objective:
    """Return the objective of a phase; raise ConfigError for an unknown one."""
    if phase not in PHASES:
        raise ConfigError(f"unknown phase {phase!r} of family var; known: {', '.join(PHASES)}")
    make, record = PHASES[phase]
    return make(system, data, record.from_dict(settings))
