"""The sizes of an image tokenizer with one code per cell of its grid; without torch."""

from dataclasses import dataclass

from nsp.config import Config
from nsp.errors import ConfigError

_LARGE = 1e6


@dataclass(frozen=True, kw_only=True)
class VqConfig(Config):
    """A VQGAN tokenizer: image (B, 3, H, W) in [-1, 1] <-> codes (B, h*w) in raster order.

    Source: Esser et al. 2021, arXiv:2012.09841; the normalised, narrow codebook is that of Yu et
    al. 2022, arXiv:2110.04627, as in github.com/FoundationVision/LlamaGen, vq_model.py.
    """

    codebook_size: int = 16384  # V
    codebook_width: int = 8  # Z, of a code vector
    is_normalised: bool = True  # codes and latents have unit length: the nearest is by cosine
    latent_channels: int = 256  # C, between encoder and the projection to code vectors
    base_channels: int = 128  # width of the finest level
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2  # per encoder level; the decoder has one more
    patch_size: int = 1  # pixels folded into channels before the finest level
    norm_groups: int = 32
    dropout: float = 0.0
    commitment_weight: float = 0.25  # beta of the VQ loss
    entropy_weight: float = 0.0  # of the loss that spreads latents over all codes; 0: off

    def __post_init__(self) -> None:
        """Check the values."""
        self.check_counts("vq", "codebook_size", "codebook_width", "latent_channels")
        self.check_counts("vq", "base_channels", "channel_multipliers", "num_res_blocks")
        self.check_counts("vq", "patch_size", "norm_groups")
        self.check_fractions("vq", "dropout")
        self.check_reals("vq", "commitment_weight", "entropy_weight", least=0, most=_LARGE)
        if self.base_channels % self.norm_groups:
            raise ConfigError(
                f"vq: base_channels={self.base_channels} must be a multiple of "
                f"norm_groups={self.norm_groups}"
            )

    @property
    def downsampling(self) -> int:
        """Pixels per cell of the grid along one axis."""
        return int(self.patch_size * 2 ** (len(self.channel_multipliers) - 1))


# 64 px to 8x8 codes. Four by four pixels are folded into channels first: on a CPU the levels of
# full and half resolution would cost twice all others together.
EMOJI_VQ = VqConfig(
    codebook_size=1024,
    codebook_width=16,
    latent_channels=64,
    base_channels=64,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    patch_size=4,
    norm_groups=8,
)
# 256 px to 16x16 codes, with a decoder for CPUs.
SMALL_VQ = VqConfig(
    latent_channels=64,
    base_channels=64,
    channel_multipliers=(1, 2, 4),
    num_res_blocks=1,
    patch_size=4,
)
# For tests: 8 px to 4x4 codes.
TINY_VQ = VqConfig(
    codebook_size=64,
    latent_channels=8,
    base_channels=8,
    channel_multipliers=(1, 2),
    num_res_blocks=1,
    norm_groups=4,
)
