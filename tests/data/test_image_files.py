import numpy as np
import pytest
from PIL import Image

from nsp.data.image_files import read_metadata, slug, write_picture
from tests.disk import largest_file

PIXELS = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Red apple", "red-apple"),
        ("../../etc/passwd", "etc-passwd"),
        ("a\nb\0c\\d", "a-b-c-d"),
        ("красное яблоко", "красное-яблоко"),
        ("???", "image"),
        ("\udcff", "image"),
    ],
)
def test_a_slug_has_only_letters_digits_and_hyphens(text, expected):
    assert slug(text) == expected


def test_a_slug_of_a_long_prompt_stays_far_below_the_limit_of_file_names():
    assert len(slug("яблоко " * 100).encode()) <= 60


def test_metadata_of_a_png_is_read_back_as_written(tmp_path):
    metadata = {"prompt": "rote Äpfel 🍎 яблоко", "seed": "3", "sampling": '{"top_k": 1}'}
    write_picture(tmp_path / "a.png", PIXELS, metadata)
    assert read_metadata(tmp_path / "a.png") == metadata


@pytest.mark.parametrize("kind", ["webp", "jpeg"])
def test_metadata_of_other_files_are_read_back_as_written(tmp_path, kind):
    metadata = {"prompt": "rote Äpfel 🍎 яблоко", "sampling": '{"top_k": 1}'}
    write_picture(tmp_path / f"a.{kind}", PIXELS, metadata)
    assert read_metadata(tmp_path / f"a.{kind}") == metadata
    with Image.open(tmp_path / f"a.{kind}") as image:
        assert image.format == kind.upper()
        assert kind == "jpeg" or np.array_equal(np.asarray(image), PIXELS)


def test_a_png_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "a.png"
    write_picture(path, PIXELS)
    before = path.read_bytes()
    with largest_file(len(before)), pytest.raises(OSError, match="File too large"):
        write_picture(path, PIXELS, {"prompt": "longer than before"})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
