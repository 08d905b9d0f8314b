"""What a caller may ask of the family `var`, and the random numbers tokens are drawn with."""

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from nsp.families.var.config import VarConfig
from nsp.family.sampling import SamplingConfig, draw_gumbel, draw_uniforms
from nsp.pipeline.requests import check_forced_tokens, check_gumbel, check_uniforms


def request_arrays(
    config: VarConfig,
    sampling: SamplingConfig,
    *,
    seed: int,
    batch: int,
    given: Mapping[str, Any],
) -> dict[str, NDArray[Any]]:
    """Return the loop's arrays: those `given`, checked, or random numbers drawn from `seed`."""
    length, vocab_size = config.num_tokens, config.vae.vocab_size
    arrays = {"uniforms": draw_uniforms(seed, batch, length)} if "uniforms" not in given else {}
    arrays |= given
    check_uniforms(arrays["uniforms"], (batch, length))
    if "forced_tokens" in arrays:
        check_forced_tokens(arrays["forced_tokens"], (batch, length), vocab_size)
    if "gumbel" in arrays:
        shape = (batch, length, vocab_size)
        check_gumbel(arrays["gumbel"], shape, more_smooth=sampling.more_smooth)
    elif sampling.more_smooth:
        arrays["gumbel"] = draw_gumbel(seed, batch, length, vocab_size)
    return arrays
