"""The tensors of the stages that draw codes in raster order; without torch.

Free axes: B images, G transformer rows (B, or 2B with the null rows behind), P cached tokens, R
logits that are sorted for top-k and top-p. Fixed: N codes of a picture, V of the codebook, S tokens
of the whole cache, which layout "in_place" hands over in every call.

`decode` is one token of the transformer and the draw of the next code in one engine run: a loop of
hundreds of short steps has no time for a second one. It also returns its logits. Where a backend
cannot sort as many codes as top-p without top-k needs, `nucleus` draws again from these.
"""

from collections.abc import Mapping

from nsp.family.contract import Span, Stage
from nsp.family.gate import Psnr, Tokens
from nsp.raster.grid import RasterGrid
from nsp.raster.vq_config import VqConfig
from nsp.stage.arena import past_spans
from nsp.stage.backend import TENSORRT_RANKS
from nsp.stage.io import Axes, StageIO

# What every drawing stage takes, in this order, and returns.
DRAW = ("index", "codes", "uniforms", "forced", "guidance")
SETTINGS = ("temperature", "top_p", "top_k")

_CONVOLUTIONS = ("conv*", "nin_shortcut.*", "qkv.*", "proj_out.*")


def needs_nucleus_stage(grid: RasterGrid, kv_layout: str) -> bool:
    """Return whether there is a stage that draws by top-p alone without sorting all codes.

    Only TensorRT, which uses this layout, cannot sort so many.
    """
    return kv_layout == "fixed" and grid.num_codes > TENSORRT_RANKS


def drawing_inputs(grid: RasterGrid) -> dict[str, Axes]:
    """Return what a draw needs beside logits.

    `index` is the number of the code, `codes` those drawn so far, -1 for the others. `forced` is a
    code to keep instead of the drawn one, or -1. `rows` is the image of every transformer row.
    """
    return {
        "index": Axes("1", "int64"),
        "codes": Axes(f"B {grid.length}", "int64"),
        "uniforms": Axes("B 1"),
        "forced": Axes("B 1", "int64"),
        "guidance": Axes("B"),  # 1: off
        "temperature": Axes("B"),
        "top_p": Axes("B"),  # 1: off
        "top_k": Axes("B", "int64"),  # 0: off
        "ranks": Axes("R", "int64"),
        "rows": Axes("G", "int64"),
    }


def drawing_outputs(grid: RasterGrid) -> dict[str, Axes]:
    """Return the results of a draw: the drawn code, and the one of every row to go on with."""
    return {
        "tokens": Axes("B 1", "int64"),
        "next": Axes("G", "int64"),
        "new_codes": Axes(f"B {grid.length}", "int64"),
        "guided": Axes(f"B 1 {grid.num_codes}"),
    }


def decode_stage(
    grid: RasterGrid,
    *,
    kv_layout: str,
    dtype: str,
    carried: Mapping[str, Axes],
    half: tuple[str, ...],
    full: tuple[str, ...],
) -> Stage:
    """Return `decode`: the token of every row and the cache -> logits, the next code, new cache.

    `carried` are the family's further inputs, the same for all tokens, with rows as first axis.
    """
    logits = Axes(f"G 1 {grid.num_codes}")
    inputs = {
        "token": Axes("G", "int64"),
        **drawing_inputs(grid),
        **carried,
        **_cached("past", "P", grid, kv_layout, dtype),
    }
    outputs = {
        "logits": logits,
        **drawing_outputs(grid),
        **_cached("new", "1", grid, kv_layout, dtype),
    }
    ends = past_spans(grid.cache(1, dtype).num_tokens)
    spans: tuple[Span, ...] = ({"P": (0, ends[-1])},)
    if kv_layout == "fixed":  # each a profile of its own
        spans = tuple({"P": end} for end in ends)
    if kv_layout == "in_place":
        spans = ({},)
    return Stage(
        io=StageIO(inputs, outputs),
        half=half,
        int8=half,
        full=full,
        spans=spans,
        max_ranks=grid.num_codes,
        gate=Tokens("logits"),
    )


def prefill_stage(
    grid: RasterGrid,
    *,
    kv_layout: str,
    dtype: str,
    prefix: Mapping[str, Axes],
    half: tuple[str, ...],
    full: tuple[str, ...],
) -> Stage:
    """Return `prefill`: the tokens of a prefix -> logits, the first code, the prefix's cache."""
    new = _cached("new", str(grid.num_prefix), grid, kv_layout, dtype)
    io = StageIO(
        {**prefix, **drawing_inputs(grid)},
        {"logits": Axes(f"G 1 {grid.num_codes}"), **drawing_outputs(grid), **new},
    )
    gate = Tokens("logits")
    return Stage(io=io, half=half, int8=half, full=full, max_ranks=grid.num_codes, gate=gate)


def nucleus_stage(grid: RasterGrid) -> Stage:
    """Return `nucleus`: logits -> the code drawn by top-p alone."""
    inputs = {"logits": Axes(f"G 1 {grid.num_codes}"), **drawing_inputs(grid)}
    return Stage(io=StageIO(inputs, drawing_outputs(grid)), max_ranks=grid.num_codes)


def decoder_stage(grid: RasterGrid, vq: VqConfig) -> Stage:
    """Return `decoder`: codes -> pixels about [0, 1]; a missing code (-1) is a cell of zeros."""
    size_px = grid.side * vq.downsampling
    io = StageIO(
        {"latent": Axes(f"B {grid.side} {grid.side}", "int64")},
        {"image": Axes(f"B 3 {size_px} {size_px}")},
    )
    half = tuple(f"vq.decoder.*{name}" for name in _CONVOLUTIONS)
    return Stage(
        io=io,
        half=("vq.post_quant_conv.*", *half),
        full=("vq.decoder.*norm*", "vq.quantize.*"),
        gate=Psnr("image"),
    )


def _cached(
    prefix: str, tokens: str, grid: RasterGrid, kv_layout: str, dtype: str
) -> dict[str, Axes]:
    """Return keys and values of so many tokens, or of the whole cache where it is not divided."""
    axes = f"{tokens} G {grid.num_kv_heads} {grid.head_width}"
    if kv_layout == "in_place":
        num_tokens = grid.cache(1, dtype).num_tokens
        axes = f"G {grid.num_kv_heads} {num_tokens} {grid.head_width}"
    names = (f"{prefix}_{kind}_{i}" for i in range(grid.depth) for kind in ("k", "v"))
    return {name: Axes(axes, dtype) for name in names}
