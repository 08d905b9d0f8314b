"""What the raster loop needs to know of a model; without torch."""

from dataclasses import dataclass

from nsp.stage.arena import KVShape


@dataclass(frozen=True, kw_only=True)
class RasterGrid:
    """A grid of codes, and the transformer that draws it."""

    side: int  # of the grid, in codes
    num_codes: int  # V, of the codebook
    num_prefix: int  # T, cached tokens before the first drawn code
    depth: int
    num_kv_heads: int
    head_width: int

    @property
    def length(self) -> int:
        """N, the codes of a picture."""
        return self.side**2

    def cache(self, rows: int, dtype: str) -> KVShape:
        """Return the size of the cache of one batch; the last code is never fed."""
        return KVShape(
            num_layers=self.depth,
            num_tokens=self.num_prefix + self.length - 1,
            rows=rows,
            num_heads=self.num_kv_heads,
            head_width=self.head_width,
            dtype=dtype,
        )
