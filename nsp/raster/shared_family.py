"""What the families of raster models have in common; without torch."""

from collections.abc import Hashable, Mapping, Sequence
from typing import ClassVar, TypeVar

from nsp.family.contract import Family, Y
from nsp.family.order import Given, Order
from nsp.raster import loop
from nsp.raster.raster_config import RasterConfig
from nsp.raster.sampling import RasterSampling
from nsp.stage.arena import KVShape

RC = TypeVar("RC", bound=RasterConfig)


class RasterFamily(Family[RC, RasterSampling, Y]):
    """A transformer that draws the codes of a grid one by one, row by row."""

    kv_layouts: ClassVar[tuple[str, ...]] = ("delta", "fixed", "in_place")
    draws_without_prompt: ClassVar[bool] = True
    sampling = RasterSampling

    def grids(self, config: RC) -> Sequence[tuple[int, int]]:
        """Return the one grid of codes."""
        return [(config.grid_side, config.grid_side)]

    def cache(self, config: RC, rows: int, dtype: str) -> KVShape:
        """Return the size of the key/value cache of one batch."""
        return config.grid.cache(rows, dtype)

    def layouts(self, config: RC) -> tuple[str, ...]:
        """Return the cache layouts that a model of this configuration can have."""
        return config.grid.layouts(self.kv_layouts)

    def given(self, config: RC) -> Mapping[str, Given]:
        """Return what an order may carry: random numbers and codes."""
        return loop.given(config.grid)

    def batch_key(self, config: RC, order: Order[RasterSampling]) -> Hashable:
        """Return what decides shapes and control flow."""
        return loop.batch_key(config.grid, order)
