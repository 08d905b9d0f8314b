"""What the training of raster models needs of a system; axes as in patches.py."""

from abc import abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from nsp.family.system import System
from nsp.raster.raster_config import RasterConfig
from nsp.raster.vq import VqTokenizer
from nsp.training.tokens import Conditions, Tokenizing


class RasterSystem(System):
    """An image tokenizer and the transformer that draws its codes."""

    config: RasterConfig
    vq: VqTokenizer
    gpt: nn.Module

    @property
    @abstractmethod
    def conditions(self) -> Conditions:
        """How captions become conditions, or the number of classes; 1 for a model without."""

    @abstractmethod
    def logits(
        self, condition_B: Tensor, dropped_B: Tensor, codes_BN: Tensor, patch_side: int = 1
    ) -> Tensor:
        """Return the logits (B, M, V) of every patch, from the condition and the patches before.

        `condition_B` are class ids, or token ids (B, T) of prompts; rows where `dropped_B` (bool)
        holds get the null condition instead.
        """

    @abstractmethod
    def units(self) -> Sequence[nn.Module]:
        """Return the repeated parts of the transformer."""

    def tokenizing(self) -> Tokenizing:
        """Return how pictures become codes: neither the decoder nor a statistic decides them."""
        others = ("decoder.", "post_quant_conv.", "quantize.usage_V")
        return Tokenizing(self.vq, self.vq.tokenize, self.vq.config, others=others)
