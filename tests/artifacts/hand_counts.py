"""The work of one call of a stage of `var`, counted by hand from the configuration.

The independent check of what is counted at export. Counted are matrix products, convolutions and
attention, a multiply-add as two operations; what is element-wise, and lookups in tables, are not.
Axes: B images, G rows, L new and P cached tokens, N prompts.
"""

from dataclasses import dataclass
from typing import Self

from nsp.families.var.config import VaeConfig, VarConfig
from nsp.stage.io import Sizes


@dataclass(frozen=True)
class Work:
    """Operations of a call, and how many weights it must read at least once."""

    flops: int = 0
    weights: int = 0

    def __add__(self, other: Self) -> "Work":
        """Return both together."""
        return Work(self.flops + other.flops, self.weights + other.weights)

    def __mul__(self, count: int) -> "Work":
        """Return `count` such parts, each with weights of its own."""
        return Work(self.flops * count, self.weights * count)


@dataclass(frozen=True)
class TextEncoderSize:
    """What the configuration of the family leaves out."""

    depth: int
    hidden_width: int


def linear(rows: int, width_in: int, width_out: int) -> Work:
    """Return the work of a linear layer with bias on `rows` vectors."""
    return Work(2 * rows * width_in * width_out, (width_in + 1) * width_out)


def conv(batch: int, side: int, channels_in: int, channels_out: int, kernel: int) -> Work:
    """Return the work of a convolution whose output is `side` squared."""
    return linear(batch * side**2, channels_in * kernel**2, channels_out)


def attention(rows: int, queries: int, keys: int, width: int) -> Work:
    """Return the work of both products of attention, all heads together `width` wide."""
    return Work(4 * rows * queries * keys * width)


def product(batch: int, rows: int, inner: int, columns: int) -> Work:
    """Return the work of a matrix product of two inputs."""
    return Work(2 * batch * rows * inner * columns)


def var_work(
    config: VarConfig, stage: str, sizes: Sizes, text_encoder: TextEncoderSize | None = None
) -> Work | None:
    """Return the work of one call of a `var` stage; None for a text encoder of unknown size."""
    match stage:
        case "text_encoder":
            return None if text_encoder is None else _text_encoder(config, sizes, text_encoder)
        case "condition":
            return _condition(config, sizes)
        case "step":
            return _step(config, sizes)
        case "select" | "select_nucleus":
            return Work()  # element-wise and sorting
        case "select_smooth" | "select_smooth_nucleus":
            vae = config.vae
            tokens = sizes["B"] * sizes["L"]
            return product(1, tokens, vae.vocab_size, vae.latent_channels)
        case "accumulate":
            return _accumulate(config, sizes)
        case "decoder":
            return _decoder(config.vae, sizes["B"], config.latent_side)
    return None


def _text_encoder(config: VarConfig, sizes: Sizes, size: TextEncoderSize) -> Work:
    assert config.text is not None
    width, tokens = config.text.text_width, config.text.max_tokens
    rows = sizes["N"] * tokens
    layer = (
        linear(rows, width, width) * 4
        + attention(sizes["N"], tokens, tokens, width)
        + linear(rows, width, size.hidden_width)
        + linear(rows, size.hidden_width, width)
    )
    return layer * size.depth


def _condition(config: VarConfig, sizes: Sizes) -> Work:
    predictor, rows = config.predictor, sizes["G"]
    width = predictor.width
    num_modulations = 1 if predictor.shared_aln else predictor.depth
    work = linear(rows, width, 6 * width) * num_modulations + linear(rows, width, 2 * width)
    if (text := config.text) is not None:
        keys_values = linear(rows * text.max_tokens, text.text_width, 2 * width)
        work = work + linear(rows, text.text_width, width) + keys_values * predictor.depth
    return work


def _step(config: VarConfig, sizes: Sizes) -> Work:
    predictor, rows, tokens = config.predictor, sizes["G"], sizes["L"]
    width, vectors = predictor.width, rows * tokens
    hidden = round(width * predictor.mlp_ratio)
    block = (
        linear(vectors, width, 3 * width)
        + attention(rows, tokens, sizes["P"] + tokens, width)
        + linear(vectors, width, width)
        + linear(vectors, width, hidden)
        + linear(vectors, hidden, width)
    )
    if (text := config.text) is not None:
        block = (
            block
            + linear(vectors, width, width) * 2
            + attention(rows, tokens, text.max_tokens, width)
        )
    return block * predictor.depth + linear(vectors, width, config.vae.vocab_size)


def _accumulate(config: VarConfig, sizes: Sizes) -> Work:
    vae, batch, side = config.vae, sizes["B"], config.latent_side
    channels, maps = vae.latent_channels, batch * vae.latent_channels
    work = product(maps, side, sizes["p"], sizes["q"]) + product(maps, side, sizes["q"], side)
    if abs(vae.quant_resi) > 1e-6:  # as MultiScaleQuantizer decides; the stage computes all phis
        work = work + conv(batch, side, channels, channels * vae.num_phis(config.num_scales), 3)
    rows, columns = sizes["r"], sizes["c"]
    work = work + product(maps, rows, side, side) + product(maps, rows, side, columns)
    return work + linear(batch * rows * columns, channels, config.predictor.width)


def _decoder(vae: VaeConfig, batch: int, side: int) -> Work:
    widths = [vae.base_channels * m for m in vae.channel_multipliers]
    width = widths[-1]
    work = conv(batch, side, vae.latent_channels, vae.latent_channels, vae.quant_conv_kernel)
    work = work + conv(batch, side, vae.latent_channels, width, 3)
    work = work + _res_block(batch, side, width, width) * 2 + _attn_block(batch, side, width)
    for level in reversed(range(len(widths))):
        lowest = level == len(widths) - 1
        for _ in range(vae.num_res_blocks + 1):
            work = work + _res_block(batch, side, width, widths[level])
            width = widths[level]
            if lowest:
                work = work + _attn_block(batch, side, width)
        if level:
            side *= 2
            work = work + conv(batch, side, width, width, 3)
    return work + conv(batch, side, width, 3 * vae.patch_size**2, 3)


def _res_block(batch: int, side: int, channels_in: int, channels_out: int) -> Work:
    work = conv(batch, side, channels_in, channels_out, 3)
    work = work + conv(batch, side, channels_out, channels_out, 3)
    if channels_in != channels_out:
        work = work + conv(batch, side, channels_in, channels_out, 1)
    return work


def _attn_block(batch: int, side: int, channels: int) -> Work:
    projections = conv(batch, side, channels, 4 * channels, 1)
    return projections + attention(batch, side**2, side**2, channels)
