"""Files of `--init-image` and `--mask-image` as arrays."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nsp.data.pictures import decode_rgb
from nsp.errors import ConfigError, DataError


def read_picture(path: Path) -> NDArray[np.float32]:
    """Return a picture (3, H, W) in [0, 1]; ConfigError for a file that is none."""
    try:
        picture = decode_rgb(path.read_bytes())
    except (DataError, OSError) as error:
        raise ConfigError(f"{path} is not a picture ({error})") from error
    return np.asarray(np.moveaxis(np.asarray(picture, np.float32) / 255, -1, 0), np.float32)


def read_mask(path: Path) -> NDArray[np.float32]:
    """Return the mean of a picture's colours (H, W), in [0, 1]: 1 is white."""
    return np.asarray(read_picture(path).mean(0), np.float32)
