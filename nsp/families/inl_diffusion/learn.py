"""The side of the family `inl_diffusion` that needs torch: new systems, modules, objectives."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from nsp.data.sources import ImageSource, Sample
from nsp.errors import ConfigError
from nsp.families.inl_diffusion.config import InlConfig
from nsp.families.inl_diffusion.model import initialize, open_gates
from nsp.families.inl_diffusion.modules import build_stages
from nsp.families.inl_diffusion.objective import (
    DitObjective,
    DitSettings,
    VaeObjective,
    VaeSettings,
    encoding,
)
from nsp.families.inl_diffusion.pretrained import read_vae
from nsp.families.inl_diffusion.sampling import InlSampling
from nsp.families.inl_diffusion.system import InlSystem
from nsp.families.inl_diffusion.text import pooled_width, text_width
from nsp.family.contract import Learner
from nsp.family.objective import Objective, TrainingData
from nsp.text.clip_pair_folder import clip_pair_parts
from nsp.text.parts import TextEncoderSettings, text_parts
from nsp.text.plain_folder import plain_parts
from nsp.text.t5 import t5_parts
from nsp.text.tokenizer import PromptTokenizer
from nsp.training.latents import write_latents
from nsp.training.reconstruction import reconstructed

if TYPE_CHECKING:
    from nsp.data.dataset import ImageDataset
    from nsp.text.encoder import TextModel

_READERS = {"clip": text_parts, "t5": t5_parts, "plain": plain_parts, "clip_pair": clip_pair_parts}
_UNTRAINED_CAPTIONS = ("red apple", "two-hump camel", "smiling cat with heart-eyes")


class InlLearner(Learner[InlConfig, InlSampling, InlSystem]):
    """The torch side of the family `inl_diffusion`."""

    parts: ClassVar[tuple[str, ...]] = ("dit", "vae")

    def build(
        self,
        config: InlConfig,
        *,
        text_encoder: "TextModel | None",
        prompt_tokenizer: PromptTokenizer | None,
    ) -> InlSystem:
        """Return a system whose weights will be loaded."""
        assert text_encoder is not None  # its models read prompts
        assert prompt_tokenizer is not None
        return InlSystem(config, text_encoder=text_encoder, prompt_tokenizer=prompt_tokenizer)

    def new_system(
        self, config: InlConfig, text_encoder: TextEncoderSettings, source: ImageSource | None
    ) -> InlSystem:
        """Return a freshly initialised system, drawn from torch's global generator.

        A pretrained folder decides width and length of the text states; otherwise the prompt
        tokenizer is trained on the captions of `source` and the encoder is new.
        """
        dit = config.dit
        read = _READERS[config.text]
        tokenizer, encoder = read(text_encoder, dit.context_width, dit.context_length, source)
        width = text_width(config.text, encoder)
        dit = dataclasses.replace(
            dit,
            context_width=width,
            context_length=tokenizer.max_tokens,
            pooled_width=pooled_width(config.text, encoder),
        )
        config = dataclasses.replace(config, dit=dit)
        vae = None if config.pretrained_vae is None else read_vae(Path(config.pretrained_vae))
        if vae is not None:
            config = dataclasses.replace(config, vae=vae.config, pretrained_vae=None)
        system = InlSystem(config, text_encoder=encoder, prompt_tokenizer=tokenizer)
        initialize(system.dit)
        if vae is not None:
            system.vae.load_state_dict(vae.state_dict())
        return system

    def untrained(self, config: InlConfig) -> InlSystem:
        """Return a system of random weights in which all of them matter, with a new encoder."""
        samples = tuple(Sample(name=c, captions=(c,), class_id=None) for c in _UNTRAINED_CAPTIONS)
        encoder = TextEncoderSettings(vocab_size=560, depth=12, num_heads=2)
        system = self.new_system(config, encoder, ImageSource(samples, (), ()))
        open_gates(system.dit)
        return system

    def modules(self, system: InlSystem, kv_layout: str) -> Mapping[str, nn.Module]:
        """Return a module for every stage."""
        return build_stages(system)

    def objective(
        self,
        phase: str,
        settings: Mapping[str, object],
        system: InlSystem,
        data: TrainingData,
    ) -> Objective:
        """Return the objective of a phase; raise ConfigError for an unknown one."""
        if phase == "vae":
            return VaeObjective(system, data, VaeSettings.from_dict(settings))
        if phase == "dit":
            return DitObjective(system, data, DitSettings.from_dict(settings))
        raise ConfigError(f"unknown phase {phase!r} of family inl_diffusion; known: vae, dit")

    def reconstruct(self, system: InlSystem, pictures_BHW3: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return pictures as the autoencoder reconstructs them."""
        vae = system.vae
        return reconstructed(vae, lambda image: vae.decode(vae.encode(image)), pictures_BHW3)

    def write_cache(self, system: InlSystem, data: "ImageDataset", file: Path) -> None:
        """Write the latents of all pictures to `file`, for `data.token_cache` of later runs."""
        write_latents(encoding(system), data, file)
