"""The side of the family `next_patch` that needs torch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from nsp.errors import ConfigError
from nsp.families.next_patch.config import NextPatchConfig
from nsp.families.next_patch.model import initialize
from nsp.families.next_patch.modules import build_stages
from nsp.families.next_patch.system import NextPatchSystem
from nsp.family.contract import Learner
from nsp.family.objective import Objective, TrainingData
from nsp.family.order import Order
from nsp.raster.predictor_phase import PredictorObjective, PredictorSettings
from nsp.raster.sampling import RasterSampling
from nsp.raster.tokenizer_phase import TokenizerObjective, TokenizerSettings
from nsp.text.parts import TextEncoderSettings
from nsp.text.tokenizer import PromptTokenizer
from nsp.training.reconstruction import reconstructed
from nsp.training.tokens import write_tokens

if TYPE_CHECKING:
    from transformers import CLIPTextModel

    from nsp.data.dataset import ImageDataset
    from nsp.data.sources import ImageSource

_SHARP_STD = 1.0  # of untrained output weights: of thousands of codes a few are likely


class NextPatchLearner(Learner[NextPatchConfig, RasterSampling, NextPatchSystem]):
    """The torch side of the family `next_patch`."""

    parts: ClassVar[tuple[str, ...]] = ("gpt", "vq")

    def build(
        self,
        config: NextPatchConfig,
        *,
        text_encoder: "CLIPTextModel | None",
        prompt_tokenizer: PromptTokenizer | None,
    ) -> NextPatchSystem:
        """Return a system whose weights will be loaded."""
        return NextPatchSystem(config)

    def new_system(
        self,
        config: NextPatchConfig,
        text_encoder: TextEncoderSettings,
        source: "ImageSource | None",
    ) -> NextPatchSystem:
        """Return a freshly initialised system, drawn from torch's global generator."""
        system = NextPatchSystem(config)
        initialize(system.gpt)
        bound = 1 / config.vq.codebook_width**0.5
        nn.init.uniform_(system.vq.quantize.embedding.weight, -bound, bound)
        return system

    def untrained(self, config: NextPatchConfig) -> NextPatchSystem:
        """Return a system of random weights in which all of them matter."""
        system = self.new_system(config, TextEncoderSettings(), None)
        nn.init.normal_(system.gpt.output.weight, std=_SHARP_STD)
        return system

    def modules(self, system: NextPatchSystem, kv_layout: str) -> Mapping[str, nn.Module]:
        """Return a module for every stage."""
        return build_stages(system, kv_layout)

    @torch.no_grad()
    def without_cache(
        self,
        system: NextPatchSystem,
        orders: Sequence[Order[RasterSampling]],
        tokens: Sequence[NDArray[np.int64]],
        latents: Sequence[NDArray[np.float32]],
    ) -> Sequence[NDArray[np.float32]]:
        """Return the logits of every row of codes from one pass, as in training."""
        codes = torch.from_numpy(np.concatenate(tokens, 1))
        classes = torch.tensor([order.condition for order in orders])
        logits = system.logits(classes, torch.zeros(len(orders), dtype=torch.bool), codes)
        return [each.numpy() for each in logits.split(system.config.grid_side, 1)]

    def objective(
        self,
        phase: str,
        settings: Mapping[str, object],
        system: NextPatchSystem,
        data: TrainingData,
    ) -> Objective:
        """Return the objective of a phase; raise ConfigError for an unknown one."""
        if phase == "tokenizer":
            return TokenizerObjective(system.vq, data, TokenizerSettings.from_dict(settings))
        if phase == "predictor":
            return PredictorObjective(system, data, PredictorSettings.from_dict(settings))
        raise ConfigError(
            f"unknown phase {phase!r} of family next_patch; known: tokenizer, predictor"
        )

    def reconstruct(
        self, system: NextPatchSystem, pictures_BHW3: NDArray[np.uint8]
    ) -> NDArray[np.uint8]:
        """Return pictures as their codes keep them."""
        return reconstructed(system.vq, system.vq.rebuilt, pictures_BHW3)

    def write_cache(self, system: NextPatchSystem, data: "ImageDataset", file: Path) -> None:
        """Write the codes of all pictures to `file`, for `data.token_cache` of later runs."""
        write_tokens(system.tokenizing(), data, file)
