import io

import numpy as np
import pytest
from PIL import Image

from nsp.data.pictures import decode_rgb
from nsp.errors import DataError


def _bytes(image: Image.Image, format_name: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 255), (255, 0, 0)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
        ("LA", (0, 0), (255, 255, 255)),
        ("L", 7, (7, 7, 7)),
        ("1", 0, (0, 0, 0)),
        ("I;16", 0x8040, (0x80, 0x80, 0x80)),
    ],
)
def test_transparency_is_on_white_and_greyscale_is_converted(
    mode: str, colour: tuple[int, ...] | int, expected: tuple[int, int, int]
) -> None:
    picture = decode_rgb(_bytes(Image.new(mode, (3, 2), colour)))
    assert (picture.mode, picture.size) == ("RGB", (3, 2))
    assert picture.getpixel((0, 0)) == expected


def test_palette_pictures_keep_their_transparency() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 0, 0, 0])
    palette.putpixel((1, 0), 1)
    picture = decode_rgb(_bytes(palette, transparency=1))
    assert picture.getpixel((0, 0)) == (10, 20, 30)
    assert picture.getpixel((1, 0)) == (255, 255, 255)


def test_exif_orientation_is_honoured() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to view
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16] = 255
    upright = decode_rgb(_bytes(Image.fromarray(pixels), "JPEG", exif=exif))
    assert upright.size == (16, 32)
    assert upright.getpixel((8, 4)) == (255, 255, 255)
    assert upright.getpixel((8, 28)) == (0, 0, 0)


def test_float_pixels_are_refused_rather_than_clipped() -> None:
    with pytest.raises(DataError, match="pixel mode F"):
        decode_rgb(_bytes(Image.new("F", (2, 2), 0.5), "TIFF"))
