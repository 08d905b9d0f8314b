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

    def layouts(self, known: tuple[str, ...]) -> tuple[str, ...]:
        """Return which of the cache layouts this model can have.

        ONNX Runtime's operator for "in_place" takes heads of a multiple of 8 channels.
        """
        return tuple(each for each in known if each != "in_place" or self.head_width % 8 == 0)

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
