"""Published weights of INL-Diffusion as a checkpoint folder."""

from collections.abc import Mapping
from pathlib import Path

from nsp.errors import ConfigError


def convert(files: Mapping[str, Path], config: Mapping[str, object], output_dir: Path) -> None:
    """Write a checkpoint folder; see `nsp convert`."""
    raise ConfigError("not yet")
