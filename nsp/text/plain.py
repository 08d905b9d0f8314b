"""Token ids to text states: a plain post-norm transformer encoder.

Learned positions, full attention among all tokens of a prompt, padding included, and a norm behind
the last layer. Weights have the names of `torch.nn.TransformerEncoder`; its fused path does not
export, so the layers are written out.

Shapes: N prompts, T tokens, D width, H heads.
Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.1.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsp.config import Config
from nsp.errors import ConfigError
from nsp.weights.module_weights import save_weights

PLAIN_MODEL_TYPE = "plain_text_encoder"
_MOST = 2**22
_FIRST_STD = 0.02  # of the embeddings of an untrained encoder


@dataclass(frozen=True, kw_only=True)
class PlainTextConfig(Config):
    """One encoder."""

    vocab_size: int
    width: int
    depth: int
    num_heads: int = 8
    mlp_width: int
    max_tokens: int

    def __post_init__(self) -> None:
        """Check the sizes."""
        names = ("vocab_size", "width", "depth", "num_heads", "mlp_width", "max_tokens")
        self.check_counts("text encoder", *names, most=_MOST)
        if self.width % self.num_heads:
            raise ConfigError(
                f"text encoder: width {self.width} does not divide into {self.num_heads} heads"
            )

    @property
    def model_type(self) -> str:
        """The kind of model, as in a folder's config.json."""
        return PLAIN_MODEL_TYPE


class _Attention(nn.Module):
    """Every token attends to all tokens of its prompt."""

    def __init__(self, config: PlainTextConfig) -> None:
        super().__init__()
        self.num_heads, width = config.num_heads, config.width
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x_NTD: Tensor) -> Tensor:
        """Return (N, T, D)."""
        qkv = F.linear(x_NTD, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        result: Tensor = self.out_proj(mixed)
        return result


class _Layer(nn.Module):
    """Attention, then two linear layers with a ReLU between; a norm behind each sum."""

    def __init__(self, config: PlainTextConfig) -> None:
        super().__init__()
        self.self_attn = _Attention(config)
        self.linear1 = nn.Linear(config.width, config.mlp_width)
        self.linear2 = nn.Linear(config.mlp_width, config.width)
        self.norm1, self.norm2 = nn.LayerNorm(config.width), nn.LayerNorm(config.width)

    def forward(self, x_NTD: Tensor) -> Tensor:
        """Return (N, T, D)."""
        x_NTD = self.norm1(x_NTD + self.self_attn(x_NTD))
        result: Tensor = self.norm2(x_NTD + self.linear2(F.relu(self.linear1(x_NTD))))
        return result


class _Layers(nn.Module):
    """All layers, under the name that torch gives them."""

    def __init__(self, config: PlainTextConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.depth))

    def forward(self, x_NTD: Tensor) -> Tensor:
        """Return (N, T, D)."""
        for layer in self.layers:
            x_NTD = layer(x_NTD)
        return x_NTD


class PlainTextModel(nn.Module):
    """The whole encoder; it is also the stage that reads prompts."""

    def __init__(self, config: PlainTextConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.pos_embedding = nn.Parameter(torch.empty(1, config.max_tokens, config.width))
        self.encoder = _Layers(config)
        self.ln_final = nn.LayerNorm(config.width)
        nn.init.normal_(self.embedding.weight, std=_FIRST_STD)
        nn.init.normal_(self.pos_embedding, std=_FIRST_STD)
        for layer in self.encoder.layers:
            nn.init.xavier_uniform_(cast("_Layer", layer).self_attn.in_proj_weight)

    def forward(self, token_ids_NT: Tensor) -> tuple[Tensor]:
        """Return text states (N, T, D), in float32."""
        x_NTD = self.embedding(token_ids_NT) + self.pos_embedding[:, : token_ids_NT.shape[1]]
        return (self.ln_final(self.encoder(x_NTD)).float(),)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors`, as models of transformers do."""
        root = Path(folder)
        save_weights(self, root)
        values = {"model_type": PLAIN_MODEL_TYPE, **self.config.to_dict()}
        (root / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
