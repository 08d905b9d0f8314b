"""The call of a pipeline: any number of orders in batches, pictures in the requested form."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from nsp.family.order import Order, Sampling
from nsp.pipeline.orders import cut_batches
from nsp.pipeline.results import PipelineOutput, StreamStep, to_uint8
from nsp.pipeline.runner import OrderRunner

OUTPUT_TYPES = ("pil", "np", "latent")
CALL_ARGUMENTS = (
    *("prompt", "class_id", "num_images_per_prompt", "seed", "negative_prompt"),
    *("output_type", "callback_on_step_end"),
)


class OnStepEnd(Protocol):
    """A callback with the signature of diffusers' `callback_on_step_end`."""

    def __call__(
        self, pipe: OrderRunner, step: int, timestep: int, callback_kwargs: dict[str, Any], /
    ) -> object:
        """Receive a finished step; the return value is ignored."""


def call(
    pipeline: OrderRunner,
    orders: Sequence[Order[Sampling]],
    output_type: str,
    on_step_end: OnStepEnd | None,
) -> PipelineOutput:
    """Return the images of all orders, in as many batches as needed."""
    for order in orders:
        pipeline.check_order(order)
    made: dict[int, Any] = {}
    for indices in cut_batches(pipeline, orders):
        batch = [orders[index] for index in indices]
        if output_type == "latent" or on_step_end is not None:
            last = None
            for step in pipeline.run(batch):
                last = StreamStep(step.index, step.total, pipeline, step)
                if on_step_end is not None:
                    latents = last.latent if step.latent is not None else None
                    on_step_end(pipeline, step.index, step.index, {"latents": latents})
            assert last is not None  # a loop has at least one step
            rows = last.latent if output_type == "latent" else last.decode()
        else:
            rows = pipeline.images(batch)
        made |= dict(zip(indices, rows, strict=True))
    stacked = np.stack([made[index] for index in range(len(orders))])
    seeds = tuple(order.seed for order in orders)
    if output_type == "latent":
        return PipelineOutput(stacked, seeds)
    if output_type == "np":
        return PipelineOutput(np.ascontiguousarray(stacked.transpose(0, 2, 3, 1)), seeds)
    from PIL import Image

    return PipelineOutput([Image.fromarray(picture) for picture in to_uint8(stacked)], seeds)
