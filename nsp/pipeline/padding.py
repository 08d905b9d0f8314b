"""Pads batches to a size that a backend has, and cuts results to the requested images."""

from collections.abc import Sequence
from dataclasses import replace

from nsp.family.order import Order, Sampling, Step
from nsp.stage.arena import Array
from nsp.stage.backend import Backend


def pad_orders(orders: Sequence[Order[Sampling]], size: int) -> Sequence[Order[Sampling]]:
    """Return `size` orders: the given ones, then repeats of the last one."""
    return [*orders, *[orders[-1]] * (size - len(orders))]


def cut_step(step: Step, num_images: int) -> Step:
    """Return a step of the first `num_images` images, as views; the images are the first axis."""
    return replace(
        step,
        latent=None if step.latent is None else step.latent[:num_images],
        drawn={n: tuple(a[:num_images] for a in parts) for n, parts in step.drawn.items()},
    )


def pad_latent(backend: Backend, latent: Array, size: int) -> Array:
    """Return a latent (size, C, h, w): the given rows, then repeats of the last one."""
    count = latent.shape[0]
    if count == size:
        return latent
    dtype = backend.stages_io["decoder"].inputs["latent"].dtype
    padded = backend.allocate((size, *latent.shape[1:]), dtype)
    backend.copy_rows(latent, padded[:count])
    for row in range(count, size):
        backend.copy_rows(latent[count - 1 :], padded[row : row + 1])
    return padded
