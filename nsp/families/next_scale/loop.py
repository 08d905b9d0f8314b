"""The scale loop of the family `next_scale`: prompt -> condition -> base -> predictors -> latent.

It does no arithmetic on tensors: it hands over views and advances counters. It is a generator and
yields after every scale, so the caller owns progress, previews and early stop.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsp.families.next_scale.config import NextScaleConfig
from nsp.families.next_scale.sampling import NextScaleSampling
from nsp.families.next_scale.stages import predictor_stage
from nsp.family.order import Encoded, Given, Order, Step, stacked, stream
from nsp.stage.arena import Array, KVShape
from nsp.stage.backend import Backend
from nsp.stage.io import Shape

Orders = Sequence[Order[NextScaleSampling]]
_LAST = "last_scale"  # its length is the number of scales that are made


def given(config: NextScaleConfig) -> Mapping[str, Given]:
    """Return the arrays that an order may have: the standard-normal noise of the first latent."""
    return {
        "noise": Given(_noise_shape(config), "float32", help="What the first latent grows from.")
    }


def _noise_shape(config: NextScaleConfig) -> Shape:
    return (config.vae.latent_channels, config.initial_size, config.initial_size)


def batch_key(config: NextScaleConfig, order: Order[NextScaleSampling]) -> Hashable:
    """Return whether an order is guided, and the scale it ends at."""
    return (_is_guided(order), order.sampling.last_scale(config))


def _is_guided(order: Order[NextScaleSampling]) -> bool:
    return order.sampling.guidance_scale != 1


def loop_inputs(config: NextScaleConfig, orders: Orders, text: Encoded) -> dict[str, NDArray[Any]]:
    """Return all inputs of the loop from the host; `time_i` is the time of Euler step i.

    The work of the loop depends only on their names and shapes, so it can be recorded.
    """
    generator, batch = config.generator, len(orders)
    images = np.arange(batch, dtype=np.int64)
    rows = np.where(text.empty, np.int64(text.num_prompts), images)  # row N: no prompt
    guided, last = _is_guided(orders[0]), orders[0].sampling.last_scale(config)
    shape = _noise_shape(config)
    inputs: dict[str, NDArray[Any]] = {
        **text.states,
        "rows": np.concatenate([rows, text.null_rows()]) if guided else rows,
        "latent": stacked(
            orders, "noise", lambda o: stream(o.seed).standard_normal(shape, np.float32)
        ),
        "image_rows": np.tile(images, 2 if guided else 1),
        "guidance": np.array([o.sampling.guidance_scale for o in orders], np.float32),
        _LAST: np.zeros(last + 1, np.int64),
    }
    if generator.base == "flow":
        inputs["step_size"] = np.array(1 / generator.flow_steps, np.float32)
        for step in range(generator.flow_steps):
            inputs[f"time_{step}"] = np.array(step / generator.flow_steps, np.float32)
    return inputs


def generate(
    backend: Backend, config: NextScaleConfig, inputs: Mapping[str, Array]
) -> Iterator[Step]:
    """Yield one Step per scale of `loop_inputs`.

    The decoder accepts any of the latents; the last one is refined. Guidance applies to the base,
    the only part with random numbers; the predictors run once per image with the condition.
    """
    batch, total = inputs["latent"].shape[0], inputs[_LAST].shape[0]
    prompts = {"text_mean": inputs["text_mean"], "rows": inputs["rows"]}
    condition = backend.run("condition", prompts)["condition"]
    latent = _base(backend, config, inputs, condition)
    yield Step(0, total, "scale", latent)
    condition = condition[:batch]
    with backend.arena(cache(config, batch, backend.kv_dtype())) as arena:
        for k in range(total - 1):
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
            yield Step(k + 1, total, "scale", latent)


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


def cache(config: NextScaleConfig, rows: int, dtype: str) -> KVShape:
    """Return the size of the cache for all scales."""
    generator = config.generator
    return KVShape(
        num_layers=generator.num_blocks,
        num_tokens=config.cache_tokens,
        rows=rows,
        num_heads=generator.num_kv_groups,
        head_width=generator.head_width,
        dtype=dtype,
    )
