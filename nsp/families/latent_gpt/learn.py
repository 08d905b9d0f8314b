"""The side of the family `latent_gpt` that needs torch."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from nsp.artifacts.systems import save_checkpoint
from nsp.data.sources import ImageSource
from nsp.errors import ConfigError
from nsp.families.latent_gpt.config import SIZES, LatentGptConfig
from nsp.families.latent_gpt.model import initialize
from nsp.families.latent_gpt.modules import build_stages
from nsp.families.latent_gpt.published import read_vq
from nsp.families.latent_gpt.system import LatentGptSystem
from nsp.family.objective import Batch
from nsp.raster.predictor_phase import PredictorObjective
from nsp.raster.raster_learner import SHARP_STD, RasterLearner, untrained_source
from nsp.text.parts import TextEncoderSettings, text_parts
from nsp.text.tokenizer import PromptTokenizer
from nsp.values import choice

if TYPE_CHECKING:
    from transformers import CLIPTextModel


class LatentGptObjective(PredictorObjective):
    """The predictor phase, whose validation also tells how well pictures follow from no prompt."""

    system: LatentGptSystem

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the loss, in nats per code, and its parts by the reference's names."""
        found = super().forward(batch)
        found["ce_loss"] = found["loss"].detach()
        if not self.training and self.system.config.text is not None:
            device, count = next(self.trained.parameters()).device, len(batch["key"])
            empty_BT = self.system.encode_prompts([""]).to(device).expand(count, -1)
            found["null_ce_loss"] = super().forward({**batch, "condition": empty_BT})["loss"]
        return found


class LatentGptLearner(RasterLearner[LatentGptConfig, LatentGptSystem]):
    """The torch side of the family `latent_gpt`."""

    predictor: ClassVar[type[PredictorObjective]] = LatentGptObjective

    def build(
        self,
        config: LatentGptConfig,
        *,
        text_encoder: "CLIPTextModel | None",
        prompt_tokenizer: PromptTokenizer | None,
    ) -> LatentGptSystem:
        """Return a system whose weights will be loaded."""
        return LatentGptSystem(config, text_encoder=text_encoder, prompt_tokenizer=prompt_tokenizer)

    def new_system(
        self, config: LatentGptConfig, text_encoder: TextEncoderSettings, source: ImageSource | None
    ) -> LatentGptSystem:
        """Return a freshly initialised system; its image tokenizer is loaded if that is configured.

        A pretrained CLIP folder decides width and length of the text condition; otherwise the
        prompt tokenizer is trained on the captions of `source` and the encoder is new. `source` is
        None for a stream. Weights are drawn from torch's global generator.
        """
        encoder, tokenizer = None, None
        if config.text is not None:
            tokenizer, encoder = text_parts(
                text_encoder, config.text.text_width, config.text.max_tokens, source
            )
            text = dataclasses.replace(
                config.text, text_width=encoder.config.hidden_size, max_tokens=tokenizer.max_tokens
            )
            config = dataclasses.replace(config, text=text)
        loaded = None
        if config.pretrained_vq is not None:
            loaded = read_vq(Path(config.pretrained_vq))
            config = dataclasses.replace(config, vq=loaded.config, pretrained_vq=None)
        system = LatentGptSystem(config, text_encoder=encoder, prompt_tokenizer=tokenizer)
        initialize(system.gpt)
        if loaded is None:
            bound = 1 / config.vq.codebook_size
            nn.init.uniform_(system.vq.quantize.embedding.weight, -bound, bound)
        else:
            system.vq.load_state_dict(loaded.state_dict())
        system.settle()
        return system

    def untrained(self, config: LatentGptConfig) -> LatentGptSystem:
        """Return a system of random weights in which all of them matter, with a new encoder."""
        encoder = TextEncoderSettings(vocab_size=560, depth=12, num_heads=2)
        system = self.new_system(config, encoder, untrained_source())
        nn.init.normal_(system.gpt.head.weight, std=SHARP_STD)
        nn.init.normal_(system.vq.quantize.embedding.weight)
        return system

    def modules(self, system: LatentGptSystem, kv_layout: str) -> Mapping[str, nn.Module]:
        """Return a module for every stage."""
        return build_stages(system, kv_layout)


def convert(tokenizer: Path, config: Mapping[str, object], output_dir: Path) -> None:
    """Write a checkpoint folder: a published tokenizer, and a new transformer to be trained.

    `config` may name a "size" of this family and a "text_encoder", a CLIP folder; without one the
    model draws without prompts.
    """
    if unknown := [key for key in config if key not in ("size", "text_encoder")]:
        raise ConfigError(f"--config: unknown key {unknown[0]!r}; known: size, text_encoder")
    size = SIZES[choice("size", config.get("size", "500m"), tuple(SIZES))]
    folder = config.get("text_encoder")
    changed = {**size.to_dict(), "pretrained_vq": str(tokenizer)}
    if folder is None:
        changed["text"] = None
    settings = TextEncoderSettings.from_dict({"folder": folder})
    model = LatentGptConfig.from_dict(changed)
    system = LatentGptLearner().new_system(model, settings, None)
    save_checkpoint(output_dir, system, notes={"converted_from": {"tokenizer": tokenizer.name}})
