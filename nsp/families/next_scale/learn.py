"""The side of the family `next_scale` that needs torch: new systems, modules, objectives."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nsp.data.dataset import ImageDataset, to_model_range
from nsp.data.sources import ImageSource, Sample
from nsp.errors import CheckpointError, ConfigError
from nsp.families.next_scale.config import NextScaleConfig, ScalesSettings
from nsp.families.next_scale.latents import encoding
from nsp.families.next_scale.modules import build_stages
from nsp.families.next_scale.objective import (
    ScalesObjective,
    VaeObjective,
    VaeSettings,
)
from nsp.families.next_scale.sampling import NextScaleSampling
from nsp.families.next_scale.system import NextScaleSystem
from nsp.families.next_scale.vae import load_vae
from nsp.family.contract import Learner
from nsp.family.objective import Objective, TrainingData
from nsp.family.order import Order
from nsp.text.parts import TextEncoderSettings, text_parts
from nsp.text.tokenizer import PromptTokenizer
from nsp.training.latents import write_latents
from nsp.training.reconstruction import reconstructed

if TYPE_CHECKING:
    from transformers import CLIPTextModel

_UNTRAINED_CAPTIONS = (
    "a beautiful landscape with mountains and a lake",
    "red apple",
    "two-hump camel",
)
_ONE_SCALE = re.compile(r"scale_(\d+)")
_PHASES = "vae, scales, scale_0, scale_1, ..."
_MEASURED_PICTURES = 2
_MAX_LATENT_SIDE = 2**9  # tables of positions have its square; 4,096 px with 8 px per cell


def _some_pictures(model: NextScaleConfig, source: ImageSource | None) -> Tensor | None:
    """Return a few pictures in [-1, 1] to measure the decoder's activations with."""
    if source is None:
        return None
    data = ImageDataset(source, model.target_size, train=False, crop=False)
    count = min(_MEASURED_PICTURES, len(data))
    return to_model_range(torch.stack([data[index]["image"] for index in range(count)]))


class NextScaleLearner(Learner[NextScaleConfig, NextScaleSampling, NextScaleSystem]):
    """The torch side of the family `next_scale`."""

    parts: ClassVar[tuple[str, ...]] = ("generator", "vae")

    def build(
        self,
        config: NextScaleConfig,
        *,
        text_encoder: "CLIPTextModel | None",
        prompt_tokenizer: PromptTokenizer | None,
    ) -> NextScaleSystem:
        """Return a system whose weights will be loaded."""
        if config.latent_side > _MAX_LATENT_SIDE:
            raise CheckpointError(
                f"target_size={config.target_size} makes latents of {config.latent_side} cells a "
                f"side; at most {_MAX_LATENT_SIDE} are loaded"
            )
        assert text_encoder is not None  # its models read prompts
        assert prompt_tokenizer is not None
        return NextScaleSystem(config, text_encoder=text_encoder, prompt_tokenizer=prompt_tokenizer)

    def new_system(
        self, config: NextScaleConfig, text_encoder: TextEncoderSettings, source: ImageSource | None
    ) -> NextScaleSystem:
        """Return a freshly initialised model; its autoencoder is loaded if that is configured.

        A pretrained CLIP folder decides width and length
        of the text condition; otherwise the prompt tokenizer is trained on the captions of `source`
        and the encoder is new. `source` is None for a stream. Weights are drawn from torch's global
        generator, which the caller seeds.
        """
        tokenizer, encoder = text_parts(
            text_encoder, config.text.text_width, config.text.max_tokens, source
        )
        text = dataclasses.replace(
            config.text, text_width=encoder.config.hidden_size, max_tokens=tokenizer.max_tokens
        )
        config = dataclasses.replace(config, text=text)
        if config.pretrained_vae is None:
            return NextScaleSystem(config, text_encoder=encoder, prompt_tokenizer=tokenizer)
        vae, vae_config = load_vae(Path(config.pretrained_vae), _some_pictures(config, source))
        config = dataclasses.replace(config, vae=vae_config, pretrained_vae=None)
        system = NextScaleSystem(config, text_encoder=encoder, prompt_tokenizer=tokenizer)
        system.vae.load_state_dict(vae.state_dict())
        return system

    def untrained(self, config: NextScaleConfig) -> NextScaleSystem:
        """Return a system of random weights with a new text encoder for a few captions."""
        samples = tuple(Sample(name=c, captions=(c,), class_id=None) for c in _UNTRAINED_CAPTIONS)
        heads = 12 if config.text.text_width % 12 == 0 else 2
        encoder = TextEncoderSettings(vocab_size=560, depth=12, num_heads=heads)
        return self.new_system(config, encoder, ImageSource(samples, (), ()))

    def modules(self, system: NextScaleSystem, kv_layout: str) -> Mapping[str, nn.Module]:
        """Return a module for every stage."""
        return build_stages(system, kv_layout)

    @torch.no_grad()
    def without_cache(
        self,
        system: NextScaleSystem,
        orders: Sequence[Order[NextScaleSampling]],
        tokens: Sequence[NDArray[np.int64]],
        latents: Sequence[NDArray[np.float32]],
    ) -> Sequence[NDArray[np.float32]]:
        """Return the latents that grow from the first one in one pass, as in training."""
        ids = system.encode_prompts([str(order.condition) for order in orders])
        condition = system.condition(ids, torch.zeros(len(orders), dtype=torch.bool))
        grown = system.generator(torch.from_numpy(latents[0]), condition)
        return [each.numpy() for each in grown]

    def objective(
        self,
        phase: str,
        settings: Mapping[str, object],
        system: NextScaleSystem,
        data: TrainingData,
    ) -> Objective:
        """Return the objective of a phase; raise ConfigError for an unknown one.

        `vae` trains the autoencoder, `scales` all scales together (or those its settings name), and
        `scale_k` that one alone.
        """
        if phase == "vae":
            if data.cache is not None and data.cache.is_given:
                raise ConfigError(
                    f"{data.cache.file} has latents of a finished autoencoder, which this phase "
                    "would change; omit it, or skip the phase with --from-phase scales"
                )
            return VaeObjective(system, data, VaeSettings.from_dict(settings))
        one = _ONE_SCALE.fullmatch(phase)
        if phase != "scales" and one is None:
            raise ConfigError(f"unknown phase {phase!r} of family next_scale; known: {_PHASES}")
        if one is not None:
            settings = {"first_scale": int(one[1]), "last_scale": int(one[1]), **settings}
        chosen = ScalesSettings.from_dict(settings)
        return ScalesObjective(system, data, chosen)

    def reconstruct(
        self, system: NextScaleSystem, pictures_BHW3: NDArray[np.uint8]
    ) -> NDArray[np.uint8]:
        """Return pictures as the autoencoder reconstructs them."""
        vae = system.vae
        return reconstructed(vae, lambda image: vae.decode(vae.encode(image)), pictures_BHW3)

    def write_cache(self, system: NextScaleSystem, data: ImageDataset, file: Path) -> None:
        """Write the latents of all pictures to `file`, for `data.token_cache` of later runs."""
        write_latents(encoding(system), data, file)
