"""Two CLIP text encoders that read the same tokens; clip_pair_folder.py has their stage and files.

Source: Podell et al. 2023, arXiv:2307.01952 (SDXL), section 2.1.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from nsp.weights.module_weights import save_weights

if TYPE_CHECKING:
    from transformers import CLIPTextModel

CLIP_PAIR_TYPE = "clip_text_model_pair"


@dataclass(frozen=True, kw_only=True)
class ClipPairConfig:
    """Both encoders, as values of transformers' CLIPTextConfig."""

    first: Mapping[str, Any]
    second: Mapping[str, Any]
    second_pad_id: int  # fills up the prompts of the second encoder

    @property
    def model_type(self) -> str:
        """The kind of model, as in a folder's config.json."""
        return CLIP_PAIR_TYPE

    @property
    def width(self) -> int:
        """Channels of the states of both together."""
        return int(self.first["hidden_size"]) + self.pooled_width

    @property
    def pooled_width(self) -> int:
        """Channels of a prompt's summary, which the second encoder makes."""
        return int(self.second["hidden_size"])


class ClipPair(nn.Module):
    """Both encoders, with their own weights."""

    def __init__(
        self, config: ClipPairConfig, first: "CLIPTextModel", second: "CLIPTextModel"
    ) -> None:
        super().__init__()
        self.config, self.first, self.second = config, first, second

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`, as models of transformers do."""
        root, config = Path(folder), self.config
        save_weights(self, root)
        values = {
            "model_type": CLIP_PAIR_TYPE,
            "first": dict(config.first),
            "second": dict(config.second),
            "second_pad_id": config.second_pad_id,
        }
        (root / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
