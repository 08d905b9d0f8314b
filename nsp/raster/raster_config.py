"""What the configurations of raster models have in common; without torch."""

from dataclasses import dataclass, field

from nsp.config import Config, ModelConfig
from nsp.errors import ConfigError
from nsp.raster.grid import RasterGrid
from nsp.raster.vq_config import VqConfig

_MAX_SIDE = 128  # of the grid: 16,384 codes


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(Config):
    """The sizes that every family's transformer has."""

    depth: int
    width: int  # D
    num_heads: int  # H
    norm_eps: float = 1e-5
    cond_drop_rate: float = 0.1  # share of the conditions replaced by the null one in training

    def __post_init__(self) -> None:
        """Check the values."""
        self.check_counts("gpt", "depth", "width", "num_heads")
        self.check_fractions("gpt", "cond_drop_rate")
        self.check_reals("gpt", "norm_eps", least=1e-12, most=0.1)
        if self.width % self.num_heads:
            raise ConfigError(
                f"gpt: width={self.width} must be a multiple of num_heads={self.num_heads}"
            )

    @property
    def head_width(self) -> int:
        """K, channels per attention head."""
        return self.width // self.num_heads

    @property
    def kv_heads(self) -> int:
        """J, heads of keys and values."""
        return self.num_heads


@dataclass(frozen=True, kw_only=True)
class RasterConfig(ModelConfig):
    """One complete model; a family adds its condition."""

    grid_side: int = 16  # codes along one side of a picture
    vq: VqConfig = field(default_factory=VqConfig)
    gpt: TransformerConfig

    def __post_init__(self) -> None:
        """Check the grid."""
        self.check_counts("model", "grid_side", least=2, most=_MAX_SIDE)

    @property
    def num_prefix(self) -> int:
        """T, tokens before the first code."""
        return 1

    @property
    def image_size_px(self) -> int:
        """Side of the square image."""
        return self.grid_side * self.vq.downsampling

    @property
    def grid(self) -> RasterGrid:
        """What the raster loop needs to know."""
        return RasterGrid(
            side=self.grid_side,
            num_codes=self.vq.codebook_size,
            num_prefix=self.num_prefix,
            depth=self.gpt.depth,
            num_kv_heads=self.gpt.kv_heads,
            head_width=self.gpt.head_width,
        )
