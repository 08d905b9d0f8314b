"""What to generate for a reference: orders that together call every stage of a raster model."""

from collections.abc import Sequence
from dataclasses import replace

from nsp.family.order import Order
from nsp.raster.grid import RasterGrid
from nsp.raster.sampling import RasterSampling
from nsp.stage.backend import TENSORRT_RANKS

_PROMPTS = ("red apple", "smiling cat with heart-eyes")


def examples(
    grid: RasterGrid, sampling: RasterSampling, *, num_classes: int | None, prompts: bool = True
) -> Sequence[Sequence[Order[RasterSampling]]]:
    """Return batches of orders: two guided images, one whose guidance ends, one without.

    One more draws by top-p alone where TensorRT has a stage of its own for that. Conditions are
    classes, prompts, or nothing; a model of prompts also draws without one.
    """
    conditions: list[str | int | None] = [None, None]
    if num_classes is not None:
        conditions = [0, num_classes - 1]
    elif prompts:
        conditions = [*_PROMPTS]
    guided = replace(sampling, guidance_scale=max(sampling.guidance_scale, 1.5), cfg_interval=-1)
    alone = [
        replace(guided, cfg_interval=grid.length // 2),
        replace(guided, guidance_scale=1.0),
    ]
    if grid.num_codes > TENSORRT_RANKS:
        alone.append(replace(guided, top_k=0, top_p=0.9))
    made = [
        [Order(each, seed, guided) for seed, each in enumerate(conditions)],
        *([Order(conditions[0], seed, each)] for seed, each in enumerate(alone)),
    ]
    has_prompts = isinstance(conditions[0], str)
    return [*made, [Order(None, len(made), sampling)]] if has_prompts else made
