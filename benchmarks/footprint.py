"""The memory one image must take, counted from the configuration: what a peak is held against.

Weights as their files are, the KV arena as the backend lays it out, and scratch: the tensors alive
at once at the widest moment of each stage. Stages add up, as each session keeps what it once took.
Text encoder and condition have little beside their weights: none of it is counted, nor are code,
libraries and what they allocate for themselves. Axes as in nsp/families/var/io.py.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from nsp.benchmarks.contest.clocked import StageCall
from nsp.benchmarks.record.result import Footprint
from nsp.families.var.config import VaeConfig, VarConfig
from nsp.stage.arena import ARENAS, HostArrays, KVShape
from nsp.stage.io import Shape, Sizes

_FLOAT_BYTES = 4  # of activations: also where weights are narrow, on a CPU


class _Counter(HostArrays):
    """Memory that is counted; what is allocated is never written, and so takes no room."""

    total = 0

    def allocate(self, shape: Shape, dtype: str) -> NDArray[Any]:
        """Return uninitialised memory."""
        array = super().allocate(shape, dtype)
        self.total += array.nbytes
        return array


def arena_bytes(kv_layout: str, shape: KVShape) -> int:
    """Return what the cache of one batch allocates."""
    counter = _Counter()
    ARENAS[kv_layout](shape, counter)
    return counter.total


def var_footprint(
    config: VarConfig,
    calls: Sequence[StageCall],
    *,
    weights_mib: float,
    kv_layout: str,
    kv_shape: KVShape,
) -> Footprint:
    """Return the memory of the `calls` of one generate."""
    scratch: dict[str, int] = {}
    for call in calls:
        floats = scratch_floats(config, call.stage, call.sizes)
        scratch[call.stage] = max(scratch.get(call.stage, 0), floats)
    return Footprint(
        weights_mib=weights_mib,
        arena_mib=arena_bytes(kv_layout, kv_shape) / 2**20,
        scratch_mib=_FLOAT_BYTES * sum(scratch.values()) / 2**20,
    )


def scratch_floats(config: VarConfig, stage: str, sizes: Sizes) -> int:
    """Return how many numbers are alive at once in one call of a stage, the cache apart."""
    predictor, codes = config.predictor, config.vae.vocab_size
    match stage:
        case "step":
            rows, tokens = sizes["G"], sizes["L"]
            vectors, width = rows * tokens, predictor.width
            scores = rows * predictor.num_heads * tokens * (sizes["P"] + tokens)
            hidden = round(predictor.mlp_ratio * width) * vectors
            # Beside the residual stream: q, k, v and the scores; or the hidden layer before and
            # after its activation; or the logits.
            widest = max(3 * vectors * width + scores, 2 * hidden, vectors * codes)
            return 2 * vectors * width + widest
        case "select" | "select_smooth" | "select_nucleus" | "select_smooth_nucleus":
            # Logits of both conditions, guided, probabilities, running sums.
            return (sizes["G"] + 3 * sizes["B"]) * sizes["L"] * codes
        case "accumulate":
            return 4 * sizes["B"] * config.vae.latent_channels * config.latent_side**2
        case "decoder":
            return _decoder(config.vae, sizes["B"], config.latent_side)
    return 0


def _decoder(vae: VaeConfig, batch: int, side: int) -> int:
    """Return the widest level: a block's input, its norm, and a convolution's two ends."""
    widths = [vae.base_channels * m for m in vae.channel_multipliers]
    last = len(widths) - 1
    sides = [side << (last - level) for level in range(len(widths))]
    levels = [4 * width * grid**2 for width, grid in zip(widths, sides, strict=True)]
    scores = side**4  # of the attention at the coarsest level
    image = 2 * 3 * (sides[0] * vae.patch_size) ** 2
    return batch * max(*levels, scores, image)


FOOTPRINTS: Mapping[str, Callable[..., Footprint]] = {"var": var_footprint}
