"""All trainable parts of one `next_patch` model together, as in checkpoints."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from nsp.errors import ConfigError
from nsp.families.next_patch.config import NextPatchConfig
from nsp.families.next_patch.model import Gpt
from nsp.raster.grid import RasterGrid
from nsp.raster.raster_system import RasterSystem
from nsp.raster.vq import VqTokenizer
from nsp.training.tokens import Conditions


class NextPatchSystem(RasterSystem):
    """Tokenizer and transformer."""

    family: ClassVar[str] = "next_patch"
    config: NextPatchConfig
    gpt: Gpt

    def __init__(self, config: NextPatchConfig) -> None:
        super().__init__(config)
        self.vq, self.gpt = VqTokenizer(config.vq), Gpt(config)

    @property
    def grid(self) -> RasterGrid:
        """The grid of codes."""
        return self.config.grid

    @property
    def cond_drop_rate(self) -> float:
        """Share of the conditions that the null one replaces in training."""
        return self.config.gpt.cond_drop_rate

    @property
    def conditions(self) -> Conditions:
        """How captions become conditions, or the number of classes."""
        return self.config.num_classes if self.config.caption is None else self.encode_prompts

    def units(self) -> Sequence[nn.Module]:
        """Return the blocks of the transformer."""
        return [*self.gpt.layers]

    def logits(
        self, condition_B: Tensor, dropped_B: Tensor, codes_BN: Tensor, patch_side: int = 1
    ) -> Tensor:
        """Return the logits (B, M, V) of every patch, from the condition and the patches before."""
        null_B = torch.full_like(condition_B, self.config.num_classes)
        prefix_B1D = self.gpt.cls_embedding(torch.where(dropped_B, null_B, condition_B))
        found: Tensor = self.gpt(prefix_B1D, codes_BN, patch_side=patch_side)
        return found

    def text_stage(self) -> nn.Module:
        """Return the stage that encodes prompts."""
        raise ConfigError("prompts need a T5 encoder")
