"""All trainable parts of one model together, as in checkpoints."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from nsp.config import ModelConfig
from nsp.errors import ConfigError
from nsp.text.tokenizer import PromptTokenizer

if TYPE_CHECKING:
    from nsp.text.encoder import TextModel


class System(nn.Module):
    """Base of a family's system: its configuration and, for prompts, encoder and tokenizer."""

    family: ClassVar[str]  # its name
    config: ModelConfig  # a family's system narrows it to its own
    text_encoder: "TextModel | None"
    prompt_tokenizer: PromptTokenizer | None

    def __init__(
        self,
        config: ModelConfig,
        text_encoder: "TextModel | None" = None,
        prompt_tokenizer: PromptTokenizer | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.text_encoder = text_encoder
        self.prompt_tokenizer = prompt_tokenizer

    def settle(self) -> None:
        """Bring what is kept of other parts up to date with them; called before it is used.

        The default keeps nothing.
        """

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Return prompt token ids (B, T); raise ConfigError for a model without prompts."""
        if self.prompt_tokenizer is None:
            raise ConfigError("this model takes no prompts")
        return torch.from_numpy(self.prompt_tokenizer.encode(prompts))
