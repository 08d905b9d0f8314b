"""The keywords that calls of a pipeline take beside their own, so that type checkers know them.

At run time the model's family decides which of them exist. Settings of families in other packages
are put into `pipe.sampling` or into orders where a type checker is used.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypedDict

import numpy as np
from numpy.typing import NDArray


class Settings(TypedDict, total=False):
    """Settings of the sampling of the families that come with nsp."""

    guidance_scale: float
    guidance_schedule: Literal["ramp", "constant", "interval"]
    guidance_interval: Sequence[float]
    guidance_until: int | None
    cfg_interval: int
    top_k: int
    top_p: float
    temperature: float
    more_smooth: bool
    target_size: int | None
    initial_size: int | None
    scale_factor: int | None
    num_inference_steps: int
    sampler: str
    eta: float
    guidance_rescale: float
    guidance_start: float
    guidance_end: float
    size: int | None
    strength: float


class Requested(Settings, total=False):
    """Settings, and the arrays that orders may carry, one row per image."""

    uniforms: NDArray[np.float32] | None
    gumbel: NDArray[np.float32] | None
    forced_tokens: NDArray[np.int64] | None
    noise: NDArray[np.float32] | None
    init_image: NDArray[np.float32] | None
    mask_image: NDArray[np.float32] | None
    control_image: NDArray[np.float32] | None


class LoadOptions(TypedDict, total=False):
    """Options of loading a model; those of a checkpoint are `device`, `verify` and `lora`."""

    precision: str | None
    device: str | None
    num_threads: int | None
    verify: bool
    lora: str | Path | None
