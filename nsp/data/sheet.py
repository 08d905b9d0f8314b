"""Contact sheets: pictures in a grid with a title under each."""

import io
import math
import textwrap
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

CONTACT_SHEET_NAME = "contact_sheet.png"  # beside the pictures
_MARGIN_PX = 8
_LINE_PX = 12
_MIN_CELL_PX = 96


def contact_sheet(
    pictures: NDArray[np.uint8] | Sequence[NDArray[np.uint8]],
    titles: Sequence[str],
    *,
    columns: int | None = None,
    lines: int = 2,
) -> Image.Image:
    """Return one image with all pictures (N of (H, W, 3)) in rows of `columns`, titles below.

    Titles are wrapped and cut after `lines` lines. Pictures under 96 px are enlarged without
    smoothing, so that their true pixels are visible.
    """
    count = len(pictures)
    columns = columns or min(8, max(1, math.ceil(math.sqrt(count))))
    side = max(pictures[0].shape[:2])
    zoom = max(1, math.ceil(_MIN_CELL_PX / side))
    cell = side * zoom
    step_x, step_y = cell + _MARGIN_PX, cell + _MARGIN_PX + lines * _LINE_PX
    rows = math.ceil(count / columns)
    sheet = Image.new("RGB", (columns * step_x + _MARGIN_PX, rows * step_y + _MARGIN_PX), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for index, (picture, title) in enumerate(zip(pictures, titles, strict=True)):
        x = _MARGIN_PX + index % columns * step_x
        y = _MARGIN_PX + index // columns * step_y
        tile = Image.fromarray(picture).resize(
            (picture.shape[1] * zoom, picture.shape[0] * zoom), Image.Resampling.NEAREST
        )
        sheet.paste(tile, (x, y))
        wrapped = textwrap.wrap(title, max(cell // 6, 8))[:lines]
        for number, line in enumerate(wrapped):
            draw.text((x, y + cell + 2 + number * _LINE_PX), line, fill="black", font=font)
    return sheet


def side_by_side(pictures: Iterable[object]) -> bytes | None:
    """Return Pillow pictures side by side as a PNG, for notebooks; None for anything else."""
    shown = [each for each in pictures if isinstance(each, Image.Image)]
    if not shown:
        return None
    strip = Image.new("RGB", (sum(each.width for each in shown), max(e.height for e in shown)))
    left = 0
    for each in shown:
        strip.paste(each, (left, 0))
        left += each.width
    file = io.BytesIO()
    strip.save(file, format="PNG")
    return file.getvalue()
