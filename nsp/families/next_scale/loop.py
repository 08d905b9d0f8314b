"""The scale loop of the family `next_scale`: prompt -> condition -> base -> predictors -> latent.

It does no arithmetic on tensors: it hands over views and advances counters. It is a generator and
yields after every scale, so the caller owns progress, previews and early stop.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsp.families.next_scale.config import NextScaleConfig
from nsp.families.next_scale.io import predictor_stage
from nsp.family.sampling import SamplingConfig
from nsp.stage.arena import Array, KVShape
from nsp.stage.backend import Backend


@dataclass(frozen=True)
class Request:
    """One batch of B images to generate."""

    sampling: SamplingConfig
    noise: NDArray[np.float32]  # (B, C, s_0, s_0), standard normal
    token_ids: NDArray[np.int64]  # (B, T) prompts from the model's own tokenizer
    null_token_ids: NDArray[np.int64]  # (1, T) the prompt "", which is no prompt

    @property
    def batch(self) -> int:
        """B, the number of images."""
        return int(self.noise.shape[0])


@dataclass(frozen=True)
class ScaleStep:
    """What is known after one scale; arrays are the backend's."""

    scale: int
    num_scales: int
    latent: Array  # (B, C, s, s), of this scale's side
    tokens: None = None  # nothing is drawn from a codebook
    guided: None = None


def loop_inputs(config: NextScaleConfig, request: Request) -> dict[str, NDArray[Any]]:
    """Return all that the loop takes from the host; `time_i` is that of Euler step i.

    What the loop does follows from the names and shapes alone, so it can be recorded.
    """
    generator, batch = config.generator, request.batch
    guided = request.sampling.guidance_scale != 1
    images = np.arange(batch, dtype=np.int64)
    inputs: dict[str, NDArray[Any]] = {
        **_condition_inputs(request, guided=guided),
        "latent": request.noise,
        "image_rows": np.tile(images, 2 if guided else 1),
        "guidance": np.full(batch, request.sampling.guidance_scale, np.float32),
    }
    if generator.base == "flow":
        inputs["step_size"] = np.array(1 / generator.flow_steps, np.float32)
        for step in range(generator.flow_steps):
            inputs[f"time_{step}"] = np.array(step / generator.flow_steps, np.float32)
    return inputs


def _condition_inputs(request: Request, *, guided: bool) -> dict[str, NDArray[np.int64]]:
    """Return distinct prompts and the prompt of every row; null rows are last when guided.

    Row N is no prompt, which the prompt "" stands for.
    """
    prompts, found = np.unique(request.token_ids, axis=0, return_inverse=True)
    rows, none = found.reshape(-1).astype(np.int64), len(prompts)
    rows = np.where((prompts == request.null_token_ids).all(1)[rows], none, rows)
    if guided:
        rows = np.concatenate([rows, np.full(request.batch, none, np.int64)])
    return {"token_ids": prompts, "rows": rows}


def generate(
    backend: Backend, config: NextScaleConfig, inputs: Mapping[str, Array]
) -> Iterator[ScaleStep]:
    """Yield one ScaleStep per scale of `loop_inputs`.

    Any latent is the decoder's input; the last one is refined. Guidance steers the base, where all
    that is random is decided; the predictors run once per image under the condition.
    """
    batch = inputs["latent"].shape[0]
    encoded = backend.run("text_encoder", {"token_ids": inputs["token_ids"]})
    condition = backend.run("condition", {**encoded, "rows": inputs["rows"]})["condition"]
    latent = _base(backend, config, inputs, condition)
    yield ScaleStep(0, config.num_scales, latent)
    condition = condition[:batch]
    with backend.arena(_kv_shape(backend, config, batch)) as arena:
        for k in range(config.num_predictors):
            past = arena.past() if config.past_tokens(k) else {}
            num_new = config.sides[k] ** 2 if config.has_keys(k) else 0
            grown = backend.run(
                predictor_stage(k),
                {"latent": latent, "condition": condition, **past},
                arena.new(num_new) if num_new else {},
            )
            arena.advance(num_new)
            latent = grown["new_latent"]
            if k == config.num_predictors - 1:
                latent = backend.run("refine", {"latent": latent})["new_latent"]
            yield ScaleStep(k + 1, config.num_scales, latent)


def _base(
    backend: Backend, config: NextScaleConfig, inputs: Mapping[str, Array], condition: Array
) -> Array:
    """Return the first latent, drawn from the noise."""
    latent = inputs["latent"]
    feeds = {
        "condition": condition,
        "rows": inputs["image_rows"],
        "guidance": inputs["guidance"],
    }
    if config.generator.base == "regression":
        return backend.run("base", {"latent": latent, **feeds})["new_latent"]
    feeds["step_size"] = inputs["step_size"]
    for step in range(config.generator.flow_steps):
        feeds["time"] = inputs[f"time_{step}"]
        latent = backend.run("base", {"latent": latent, **feeds})["new_latent"]
    return latent


def _kv_shape(backend: Backend, config: NextScaleConfig, rows: int) -> KVShape:
    """Return the size of the cache for all scales."""
    generator = config.generator
    return KVShape(
        num_layers=generator.num_blocks,
        num_tokens=config.cache_tokens,
        rows=rows,
        num_heads=generator.num_kv_groups,
        head_width=generator.head_width,
        dtype=backend.kv_dtype(),
    )
