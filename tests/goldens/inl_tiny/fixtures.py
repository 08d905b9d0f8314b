"""Reads the fixtures in this folder; README.md here says how they were made."""

import json
from functools import cache
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from nsp.diffusion.noise import Noise
from nsp.families.inl_diffusion.config import PUBLIC_NOISE, DitConfig, InlConfig, VaeConfig

GOLDEN_DIR = Path(__file__).parent


@cache
def _file(name: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = load_file(GOLDEN_DIR / f"{name}.safetensors")
    return found


def tensors(prefix: str = "", file: str = "io") -> dict[str, Tensor]:
    """Return the tensors of a file whose names begin with `prefix`, without it."""
    return {n.removeprefix(prefix): t for n, t in _file(file).items() if n.startswith(prefix)}


def weights(part: str) -> dict[str, Tensor]:
    """Return the public weights of the vae, the dit or the text encoder."""
    return _file(f"weights_{part}")


def config(noise: Noise = PUBLIC_NOISE) -> InlConfig:
    """Return our configuration of the tiny model."""
    values = json.loads((GOLDEN_DIR / "config.json").read_text())
    vae, dit = values["vae"], values["dit"]
    return InlConfig(
        latent_side=dit["img_size"],
        vae=VaeConfig(
            base_channels=vae["base_channels"],
            channel_multipliers=tuple(vae["channel_mult"]),
            num_res_blocks=vae["num_res_blocks"],
            latent_channels=vae["latent_dim"],
        ),
        dit=DitConfig(
            width=dit["d_model"],
            depth=dit["num_layers"],
            num_heads=dit["num_heads"],
            num_kv_heads=dit["num_kv_heads"],
            context_width=dit["context_dim"],
            context_length=values["context_length"],
        ),
        noise=noise,
    )
