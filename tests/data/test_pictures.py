import io
import logging
import os
import struct
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from PIL import Image, ImageFile

from nsp.data import pictures
from nsp.data.bounds import MEMORY_BYTES, ByteBudget, read_regular
from nsp.data.pictures import MAX_PIXELS, decode_rgb, picture_in_memory
from nsp.errors import DataError
from tests.data.picture_files import encoded


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


# Limits that are ours

LARGE = _bytes(Image.new("1", (11000, 9000)))
TOO_LARGE = _bytes(Image.new("1", (16000, 12000)))


@pytest.mark.parametrize("action", ["error", "always", "ignore"])
def test_a_large_picture_is_taken_quietly_under_every_filter(
    action: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "_to_rgb", lambda opened: opened)  # a second, and nothing new
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter(action)  # type: ignore[arg-type]
        before = list(warnings.filters)
        assert decode_rgb(LARGE).size == (11000, 9000)
        with pytest.raises(DataError, match=r"^192 million pixels; at most 179 million are read"):
            decode_rgb(TOO_LARGE)
        assert list(warnings.filters) == before
    assert told == []


def test_the_limit_is_the_same_for_every_format_and_where_pillow_draws_its_line() -> None:
    assert Image.MAX_IMAGE_PIXELS is not None
    assert MAX_PIXELS == 2 * Image.MAX_IMAGE_PIXELS
    with pytest.raises(DataError, match=r"^192 million pixels; .* make it smaller$"):
        decode_rgb(_bytes(Image.new("1", (16000, 12000)), "TIFF", compression="group4"))
    claims = encoded(".webp")
    header = b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\x10\0\0\0" + b"\xfe\x3f\0" * 2 + claims[12:]
    with pytest.raises(DataError, match=r"^268 million pixels; .* make it smaller$"):
        decode_rgb(header)


def test_a_lower_limit_of_the_process_is_told_in_our_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(DataError, match="more pixels than this process lets Pillow read"):
        decode_rgb(encoded(".png"))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7000\n",
            "Git LFS pointer",
        ),
        (b"<!DOCTYPE html><html>not found</html>", "web page"),
        (b"words", "not a picture Pillow can read"),
        (_bytes(Image.new("RGB", (4, 4)), "EPS"), "a PostScript file; convert it to PNG"),
        (encoded(".jpg", size=(64, 64))[:700], "cut short: its end is missing"),
        (encoded(".png")[:60], "cut short: its end is missing"),
        (encoded(".png")[:60] + bytes(60) + encoded(".png")[120:], "damaged: it cannot be decoded"),
    ],
)
def test_damage_is_told_in_our_words(content: bytes, reason: str) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        decode_rgb(content)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "jpeg", "group4"])
def test_a_damaged_tiff_leaves_no_words_of_a_library(
    compression: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Which libtiff writes past Python, from any thread; afterwards it may again."""
    noise = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).convert("1" if compression == "group4" else "RGB")
    content = _bytes(picture, "TIFF", compression=compression)

    def decode(seed: int) -> None:
        damaged = bytearray(content)
        for place in np.random.default_rng(seed).integers(8, len(content), size=6).tolist():
            damaged[place] ^= 0xFF
        with suppress(DataError):
            decode_rgb(bytes(damaged))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(decode, range(20)))
    assert capfd.readouterr().err == ""
    if compression == "tiff_lzw":
        with suppress(OSError):
            Image.open(io.BytesIO(content[:300] + bytes(600) + content[900:])).load()
        assert capfd.readouterr().err != ""


def test_errors_in_the_log_of_pillow_are_told_in_our_words(
    caplog: pytest.LogCaptureFixture,
) -> None:
    content = _bytes(Image.new("RGB", (4, 4)), "TIFF")
    samples = struct.pack("<HHI", 277, 3, 1)  # the tag, a short, one
    assert content.count(samples) == 1
    damaged = content.replace(samples + b"\3\0", samples + b"\3\x47")
    with pytest.raises(DataError, match=r"not a picture|damaged"):
        decode_rgb(damaged)
    assert [record.getMessage() for record in caplog.records if record.name[:3] == "PIL"] == []
    assert logging.getLogger("PIL").level == logging.NOTSET


def test_a_picture_that_memory_does_not_hold_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(opened: object) -> None:
        raise MemoryError

    monkeypatch.setattr(pictures, "_to_rgb", full)
    with pytest.raises(DataError, match="not enough memory to decode it; make it smaller"):
        decode_rgb(encoded(".png"))


@dataclass(frozen=True)
class _InMemory:
    content: bytes
    path = Path("a.png")

    def size(self) -> int:
        return len(self.content)

    def read(self) -> bytes:
        return self.content


def _look(content: bytes) -> int:
    with picture_in_memory(_InMemory(content)) as (_, picture):
        return picture.width


@pytest.mark.parametrize("look", [decode_rgb, _look])
@pytest.mark.parametrize("small_file", [0, 1 << 20])
def test_pictures_that_claim_much_are_decoded_one_after_the_other(
    look: Callable[[bytes], object], small_file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six threads, a budget for one: never two at once, and all of them come to an end."""
    inside: list[int] = []
    most: list[int] = []
    lock = threading.Lock()
    decode = pictures._to_rgb

    def counted(opened: ImageFile.ImageFile) -> Image.Image:
        with lock:
            inside.append(1)
            most.append(len(inside))
        rgb = decode(opened)
        with lock:
            inside.pop()
        return rgb

    monkeypatch.setattr(pictures, "_MEMORY", ByteBudget(1000))
    monkeypatch.setattr(pictures, "_SMALL_FILE", small_file)
    monkeypatch.setattr(pictures, "_to_rgb", counted)
    content = encoded(".png", size=(400, 300))
    with ThreadPoolExecutor(6) as pool:
        assert len(list(pool.map(look, [content] * 24))) == 24
    assert max(most) == 1


@pytest.mark.parametrize("small_file", [0, 1 << 20])
def test_the_memory_of_a_picture_is_counted_until_nobody_looks_at_it(
    small_file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = ByteBudget(1 << 20)
    monkeypatch.setattr(pictures, "_MEMORY", budget)
    monkeypatch.setattr(pictures, "_SMALL_FILE", small_file)
    with picture_in_memory(_InMemory(encoded(".png", size=(400, 300)))):
        assert budget._left <= (1 << 20) - 400 * 300 * 3
    assert budget._left == 1 << 20


# Prints, for each picture, the bytes that decoding took at most and those that were foreseen.
_MEASURE = """
from PIL import Image
from nsp.data import pictures
from tests.data.test_pictures import transparent
Image.init()
status = lambda key: next(
    1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)
)
for content in transparent((1800, 1800)):
    foreseen = pictures._memory_of(pictures._opened(content))
    before = status("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")
    pictures.decode_rgb(content)
    print(status("VmHWM") - before, foreseen)
"""


def transparent(size: tuple[int, int]) -> list[bytes]:
    """Return transparent pictures in the forms that Pillow knows."""
    palette = Image.new("P", size, 1)
    palette.putpalette([10, 20, 30, 0, 0, 0])
    return [
        _bytes(Image.new("RGBA", size, (1, 2, 3, 100))),
        _bytes(Image.new("LA", size, (1, 100))),
        _bytes(palette, bits=1, transparency=0),
        _bytes(Image.new("RGB", size, (1, 2, 3)), transparency=(1, 2, 3)),
        _bytes(Image.new("L", size, 9), transparency=9),
        _bytes(palette, "GIF", transparency=0),
        _bytes(Image.new("RGBA", size, (1, 2, 3, 100)), "WEBP", lossless=True, method=0),
    ]


def test_decoding_takes_no_more_memory_than_is_foreseen() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE], capture_output=True, text=True, check=True
    )
    rows = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(rows) == 7
    slack = 24 << 20  # what the allocators keep, and a strip
    assert [row for row in rows if row[0] > row[1] + slack] == []


@pytest.mark.parametrize("number", range(7))
def test_strips_of_a_transparent_picture_meet(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    content = transparent((37, 23))[number]
    whole = decode_rgb(content)
    monkeypatch.setattr(pictures, "_STRIP_PIXELS", 100)
    assert decode_rgb(content).tobytes() == whole.tobytes()
    with Image.open(io.BytesIO(content)) as opened:
        pixels = opened.convert("RGBA")
    white = Image.new("RGBA", pixels.size, "white")
    assert whole.tobytes() == Image.alpha_composite(white, pixels).convert("RGB").tobytes()


def test_no_picture_takes_more_than_the_budget() -> None:
    """Every PNG and JPEG of the most pixels does with it; of other formats it is told."""
    width, height = 13_400, MAX_PIXELS // 13_400
    for mode, format_name, info in (
        ("RGBA", "PNG", {}),
        ("LA", "PNG", {}),
        ("P", "PNG", {"transparency": 0}),
        ("I;16", "PNG", {}),
        ("RGB", "PNG", {"transparency": (0, 0, 0)}),
        ("CMYK", "JPEG", {}),
    ):
        claims = SimpleNamespace(
            mode=mode, format=format_name, info=info, width=width, height=height
        )
        assert pictures._memory_of(cast(ImageFile.ImageFile, claims)) <= MEMORY_BYTES
    content = _bytes(Image.new("RGB", (8, 8)), "JPEG2000")
    start = content.index(b"ihdr") + 4
    claiming = content[:start] + struct.pack(">II", 9000, 11000) + content[start + 8 :]
    with pytest.raises(DataError, match=r"^11000 x 9000 pixels, .* 2.4 GiB .* at most 2 GiB"):
        decode_rgb(claiming)


def test_only_regular_files_of_a_bounded_size_are_read(tmp_path: Path) -> None:
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "sparse.png").touch()
    os.truncate(tmp_path / "sparse.png", 1 << 40)
    for name in ("zero", "pipe"):
        with pytest.raises(DataError, match="not a regular file"):
            read_regular(tmp_path / f"{name}.png", most_bytes=1 << 30)
    with pytest.raises(
        DataError, match="1,099,511,627,776 bytes; at most 1,073,741,824 are allowed"
    ):
        read_regular(tmp_path / "sparse.png", most_bytes=1 << 30)


def test_a_slice_that_claims_more_than_there_is_takes_no_more_memory(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"0123456789")
    assert read_regular(tmp_path / "a", most_bytes=1 << 40, offset=6, num_bytes=1 << 40) == b"6789"
    assert read_regular(tmp_path / "a", most_bytes=9, offset=20, num_bytes=5) == b""


def test_reading_pictures_needs_no_torch() -> None:
    code = "import sys, nsp.data.pictures; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
