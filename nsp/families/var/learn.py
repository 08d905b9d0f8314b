"""The side of the family `var` that needs torch: new systems, modules, objectives."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from nsp.data.dataset import ImageDataset
from nsp.data.sources import ImageSource
from nsp.errors import ConfigError
from nsp.families.var.config import VarConfig, with_condition
from nsp.families.var.decoder_objective import DecoderObjective, DecoderSettings
from nsp.families.var.model import initialize
from nsp.families.var.modules import build_stages
from nsp.families.var.objective import PredictorObjective, PredictorSettings
from nsp.families.var.sampling import VarSampling
from nsp.families.var.system import VarSystem
from nsp.families.var.tokenizer_objective import TokenizerObjective, TokenizerSettings
from nsp.family.classes import ClassCondition
from nsp.family.contract import Learner
from nsp.family.objective import Objective, TrainingData
from nsp.family.order import Order
from nsp.text.parts import TextEncoderSettings, text_parts
from nsp.text.tokenizer import PromptTokenizer
from nsp.training.reconstruction import reconstructed
from nsp.training.tokens import write_tokens

if TYPE_CHECKING:
    from transformers import CLIPTextModel

# Of untrained systems. Gates of about 0.3 where the published start has 1e-5: without the branches,
# two thirds of what decides the logits are gone. Logits of standard deviation 9: of 4096 codes
# about three are likely. Were they nearly flat, the smallest rounding would flip tokens (std 3: 3 %
# of them in fp16), unlike in a trained model. Of w512 in int8 logits are off by 1.7 % of their
# range, and 91 % of the worst scale's tokens stay.
_OPEN_GATES, _SHARP_HEAD = 1.0, 15.0
_UNTRAINED_CLASSES = 10

PHASES = ("tokenizer", "decoder", "predictor")


class VarLearner(Learner[VarConfig, VarSampling, VarSystem]):
    """The torch side of the family `var`."""

    parts: ClassVar[tuple[str, ...]] = ("predictor", "vae")

    def build(
        self,
        config: VarConfig,
        *,
        text_encoder: "CLIPTextModel | None",
        prompt_tokenizer: PromptTokenizer | None,
    ) -> VarSystem:
        """Return a system whose weights will be loaded."""
        return VarSystem(config, text_encoder=text_encoder, prompt_tokenizer=prompt_tokenizer)

    def new_system(
        self, config: VarConfig, text_encoder: TextEncoderSettings, source: ImageSource | None
    ) -> VarSystem:
        """Return a freshly initialised model.

        A pretrained CLIP folder decides width and length
        of the text condition; otherwise the prompt tokenizer is trained on the captions of `source`
        and the encoder is new. `source` is None for a stream. Weights are drawn from torch's global
        generator, which the caller seeds.
        """
        encoder, tokenizer = None, None
        if config.text is not None:
            tokenizer, encoder = text_parts(
                text_encoder, config.text.text_width, config.text.max_tokens, source
            )
            text = dataclasses.replace(
                config.text,
                text_width=encoder.config.hidden_size,
                max_tokens=tokenizer.max_tokens,
            )
            config = with_condition(config, text)
        system = VarSystem(config, text_encoder=encoder, prompt_tokenizer=tokenizer)
        initialize(system.predictor)
        bound = 1 / config.vae.latent_channels**0.5
        nn.init.uniform_(system.vae.quantize.embedding.weight, -bound, bound)
        return system

    def untrained(self, config: VarConfig) -> VarSystem:
        """Return a class-conditional system of random weights in which all of them matter.

        The published initialisation would make parity blind: it all but closes the gates of the
        residual branches, hardly uses the class, and leaves logits almost constant.
        """
        if config.text is not None:
            config = with_condition(config, ClassCondition(num_classes=_UNTRAINED_CLASSES))
        system = self.new_system(config, TextEncoderSettings(), None)
        initialize(system.predictor, adaln_gamma=_OPEN_GATES, head=_SHARP_HEAD)
        nn.init.normal_(system.predictor.class_emb.weight)
        return system

    def modules(self, system: VarSystem, kv_layout: str) -> Mapping[str, nn.Module]:
        """Return a module for every stage."""
        return build_stages(system, kv_layout)

    @torch.no_grad()
    def without_cache(
        self,
        system: VarSystem,
        orders: Sequence[Order[VarSampling]],
        tokens: Sequence[NDArray[np.int64]],
        latents: Sequence[NDArray[np.float32]],
    ) -> Sequence[NDArray[np.float32]]:
        """Return the logits of all scales from one pass, as in training."""
        maps = [torch.from_numpy(each) for each in tokens]
        conditions = [order.condition for order in orders]
        ids = (
            torch.tensor(conditions)
            if system.config.text is None
            else system.encode_prompts([str(each) for each in conditions])
        )
        conditioning = system.condition(ids, torch.zeros(len(orders), dtype=torch.bool))
        logits = system.predictor(conditioning, system.vae.quantize.teacher_input(maps[:-1]))
        return [each.numpy() for each in logits.split([m.shape[1] for m in maps], 1)]

    def objective(
        self,
        phase: str,
        settings: Mapping[str, object],
        system: VarSystem,
        data: TrainingData,
    ) -> Objective:
        """Return the objective of a phase; raise ConfigError for an unknown one."""
        if phase not in PHASES:
            raise ConfigError(f"unknown phase {phase!r} of family var; known: {', '.join(PHASES)}")
        if phase == "tokenizer":
            if data.cache is not None and data.cache.is_given:
                raise ConfigError(
                    f"{data.cache.file} has tokens of a finished tokenizer, which this phase would "
                    "change; omit it, or skip the phase with --from-phase predictor"
                )
            return TokenizerObjective(system, data, TokenizerSettings.from_dict(settings))
        if phase == "decoder":
            return DecoderObjective(system, data, DecoderSettings.from_dict(settings))
        predictor = PredictorSettings.from_dict(settings)
        return PredictorObjective(system, data, predictor)

    def reconstruct(self, system: VarSystem, pictures_BHW3: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return pictures as the tokenizer reconstructs them."""
        vae = system.vae
        return reconstructed(
            vae,
            lambda image: vae.decode(vae.quantize(vae.encode(image)).latents[-1]),
            pictures_BHW3,
        )

    def write_cache(self, system: VarSystem, data: ImageDataset, file: Path) -> None:
        """Write the tokens of all pictures to `file`, for `data.token_cache` of later runs."""
        write_tokens(system.tokenizing(), data, file)
