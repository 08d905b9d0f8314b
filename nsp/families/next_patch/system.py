"""All trainable parts of one `next_patch` model together, as in checkpoints."""

from typing import ClassVar

from torch import nn

from nsp.errors import ConfigError
from nsp.families.next_patch.config import NextPatchConfig
from nsp.families.next_patch.model import Gpt
from nsp.family.system import System
from nsp.raster.vq import VqTokenizer


class NextPatchSystem(System):
    """Tokenizer and transformer."""

    family: ClassVar[str] = "next_patch"
    config: NextPatchConfig

    def __init__(self, config: NextPatchConfig) -> None:
        super().__init__(config)
        self.vq, self.gpt = VqTokenizer(config.vq), Gpt(config)

    def text_stage(self) -> nn.Module:
        """Return the stage that encodes prompts."""
        raise ConfigError("prompts need a T5 encoder")
