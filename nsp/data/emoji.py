"""Builds the embedded data set: Noto Color Emoji at 64 px, captioned with their English names.

    nsp data build --font NotoColorEmoji.ttf --output nsp/data/emoji.tar

The same font and the same versions of Pillow, libwebp and `emoji` give the same bytes. The result
is one tar:

    <codepoints>.txt     the caption, UTF-8: "woman firefighter medium-dark skin tone"
    <codepoints>.webp    the picture, lossless, RGB on white; codepoints as "1f469-1f3fe"
    __heldout__          the samples that are only in the split 'heldout' (see heldout.py)

The pictures are Noto Emoji, SIL Open Font License 1.1: see NOTICE.md next to this file.
"""

import io
import logging
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features

from nsp.data.heldout import HELDOUT_MEMBER, parse_heldout
from nsp.data.tars import write_members
from nsp.errors import DataError, MissingExtraError
from nsp.files import write_file

logger = logging.getLogger(__name__)

HELDOUT_FILE = Path(__file__).with_name("emoji_heldout.tsv")
STRIKE_PX = 109  # the only size at which the font has bitmaps
CELL_PX = (136, 128)  # advance and height of one bitmap of that strike
PICTURE_PX = 64


@dataclass(frozen=True, kw_only=True)
class Emoji:
    """One emoji: its text, its hyphenated hexadecimal codepoints and its English caption."""

    text: str
    codepoints: str
    caption: str


def list_emoji() -> list[Emoji]:
    """Return every fully-qualified emoji the `emoji` package names, sorted by codepoints."""
    try:
        import emoji
    except ImportError as error:
        raise MissingExtraError("emoji", "emoji") from error
    fully_qualified = emoji.STATUS["fully_qualified"]
    found = [
        Emoji(
            text=text,
            codepoints="-".join(f"{ord(character):x}" for character in text),
            caption=data["en"].strip(":").replace("_", " "),
        )
        for text, data in emoji.EMOJI_DATA.items()
        if data["status"] == fully_qualified
    ]
    return sorted(found, key=lambda entry: entry.codepoints)


def load_font(path: Path) -> ImageFont.FreeTypeFont:
    """Return the colour font at its bitmap size, with the layout engine that joins sequences.

    Raises DataError when the file is not a font with a 109 px strike, or when Pillow lacks RAQM
    (without it "woman firefighter" is drawn as a woman and a fire engine).
    """
    if not features.check("raqm"):
        raise DataError(
            "Pillow was built without RAQM, which joins emoji sequences into one glyph; "
            "install a Pillow wheel from PyPI and the system library libfribidi0"
        )
    try:
        return ImageFont.truetype(path, STRIKE_PX, layout_engine=ImageFont.Layout.RAQM)
    except OSError as error:
        raise DataError(
            f"{path}: not a font with {STRIKE_PX} px bitmaps ({error}); give the path of "
            "NotoColorEmoji.ttf (Debian package fonts-noto-color-emoji)"
        ) from error


def renders_as_one_glyph(font: ImageFont.FreeTypeFont, text: str) -> bool:
    """Return whether the font draws `text` as exactly one bitmap.

    An unknown emoji has an empty bounding box; an unknown sequence is as wide as its parts.
    """
    return font.getbbox(text) == (0, 0, *CELL_PX)


def render(font: ImageFont.FreeTypeFont, text: str) -> Image.Image:
    """Return one emoji as an RGB picture of 64 x 64 px on white, centred, aspect kept."""
    width, height = CELL_PX
    canvas = Image.new("RGBA", (width, width), "white")
    ImageDraw.Draw(canvas).text((0, (width - height) // 2), text, font=font, embedded_color=True)
    size = (PICTURE_PX, PICTURE_PX)
    return canvas.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def encode_webp(picture: Image.Image) -> bytes:
    """Return the picture as lossless WebP.

    Effort 75 and method 4 because 100 and 6 take 20 times as long and save 1.4 %.
    """
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", lossless=True, quality=75, method=4)
    return buffer.getvalue()


def build(font_path: Path, output: Path, *, heldout_path: Path = HELDOUT_FILE) -> int:
    """Write the tar and return the number of its pictures.

    Raises DataError when no picture has the codepoints and caption of a held-out emoji: with a
    wrong list, training could see held-out pictures.
    """
    font = load_font(font_path)
    entries = [entry for entry in list_emoji() if renders_as_one_glyph(font, entry.text)]
    heldout = heldout_path.read_bytes()
    rows = parse_heldout(heldout.decode("utf-8"), where=str(heldout_path))
    missing = set(rows) - {(entry.codepoints, entry.caption) for entry in entries}
    if missing:
        raise DataError(
            f"{heldout_path}: {font_path.name} cannot draw {len(missing)} held-out emoji, first "
            f"{sorted(missing)[0]}; use fonts-noto-color-emoji 2.042 and emoji 2.16"
        )
    members = [(HELDOUT_MEMBER, heldout)]
    for entry in entries:
        members.append((f"{entry.codepoints}.txt", entry.caption.encode("utf-8")))
        members.append((f"{entry.codepoints}.webp", encode_webp(render(font, entry.text))))
    with write_file(output) as partial:
        write_members(partial, members)
    logger.info("%s: %d pictures, %d bytes", output, len(entries), output.stat().st_size)
    return len(entries)
