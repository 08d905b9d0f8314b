"""What a caller may ask of the family `next_scale`, and the noise an image is drawn from."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsp.errors import ConfigError
from nsp.families.next_scale.config import NextScaleConfig
from nsp.family.sampling import SamplingConfig, stream

_UNUSED = (
    *("guidance_schedule", "guidance_interval", "guidance_until"),
    *("top_k", "top_p", "temperature", "more_smooth"),
)


def request_arrays(
    config: NextScaleConfig,
    sampling: SamplingConfig,
    *,
    seed: int,
    batch: int,
    given: Mapping[str, Any],
) -> dict[str, NDArray[Any]]:
    """Return the loop's random numbers: those `given`, checked, or drawn from `seed`.

    Raises ConfigError for a setting that draws codes: there are none here.
    """
    default = SamplingConfig()
    for name in _UNUSED:
        if getattr(sampling, name) != getattr(default, name):
            raise ConfigError(
                f"{name} is about drawing codes scale by scale, and family next_scale draws "
                "none; leave it out"
            )
    side = config.initial_size
    shape = (batch, config.vae.latent_channels, side, side)
    noise = given.get("noise")
    if noise is None:
        return {"noise": draw_noise(seed, shape)}
    if not isinstance(noise, np.ndarray) or noise.shape != shape or noise.dtype != np.float32:
        found = f"{noise.dtype} {noise.shape}" if isinstance(noise, np.ndarray) else type(noise)
        raise ConfigError(f"noise is {found}; expected a NumPy array, float32 {shape}")
    if not bool(np.isfinite(noise).all()):
        raise ConfigError("noise must be finite: it holds NaN or infinity")
    return {"noise": noise}


def draw_noise(seed: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return standard-normal numbers: image i of the batch has the stream (seed, i)."""
    rows = [stream(seed, i).standard_normal(shape[1:], np.float32) for i in range(shape[0])]
    return np.stack(rows)
