import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nsp.data.sources import survey
from nsp.data.stats import Stats, collect, sample_sheet, write_stats
from nsp.errors import DataError
from tests.data.picture_files import encoded, write_files

PNG = encoded(".png", size=(24, 16))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return four readable pictures (two alike, one held out twice over), and bad ones."""
    files: dict[str, bytes | str] = {"__heldout__": "name\tcaption\nc.png\tred apple\nzz\tpear\n"}
    files |= {"a.png": PNG, "a.txt": "a big red apple"}
    files |= {"b.png": encoded(".png", 1, (10, 20)), "b.txt": "Red Apple"}
    files |= {"c.png": PNG, "c.txt": "an apple's core"}
    files |= {"d.png": encoded(".png", 2, (10, 20)), "d.txt": "a  BIG red apple"}
    files |= {"broken.png": PNG[:40], "broken.txt": "x", "alone.png": PNG, "notes.md": "x"}
    return write_files(tmp_path / "set", files)


def test_counts_are_true(folder: Path) -> None:
    stats = collect(survey(folder))
    assert (stats.num_samples, stats.num_train) == (4, 2)
    assert stats.num_bytes == sum((folder / f"{name}.png").stat().st_size for name in "abcd")
    assert (stats.width_px.least, stats.width_px.median, stats.width_px.most) == (10, 17, 24)
    assert stats.sizes == {"24x16": 2, "10x20": 2}
    assert (stats.caption_words.least, stats.caption_words.mean) == (2, 3.25)
    assert stats.num_captions == 3  # case and spacing do not count
    assert stats.words == {"red": 3, "apple": 3, "a": 2, "big": 2, "an": 1, "apple's": 1, "core": 1}
    assert Stats.from_dict(json.loads(json.dumps(stats.to_dict()))) == stats


def test_duplicates_and_bad_files_are_named(folder: Path) -> None:
    stats = collect(survey(folder))
    assert stats.duplicate_pictures.groups == (("a.png", "c.png"),)
    assert (stats.duplicate_captions.num_groups, stats.duplicate_captions.num_extra) == (1, 1)
    assert stats.duplicate_captions.groups == (("a.png", "d.png"),)
    assert [problem.partition(" ")[0] for problem in stats.problems] == ["alone.png", "broken.png"]
    assert stats.unused == ("notes.md",)


def test_the_overlap_with_what_is_held_out_is_told(folder: Path) -> None:
    held = collect(survey(folder)).heldout
    assert (held.num_listed, held.num_found, held.num_by_caption_only) == (2, 2, 1)
    assert held.absent == ("zz",)
    assert held.same_picture == ("a.png",)  # training sees the picture of c.png


def test_classes_are_counted_empty_ones_too(tmp_path: Path) -> None:
    write_files(tmp_path, {"cat/1.png": PNG, "cat/2.png": PNG, "dog/1.png": PNG, "eel/1.png": b""})
    assert collect(survey(tmp_path)).classes == {"cat": 2, "dog": 1, "eel": 0}


def test_the_sheet_shows_whole_pictures(folder: Path, tmp_path: Path) -> None:
    sheet = sample_sheet(survey(folder))
    assert sheet.width > 2 * 24
    colours = np.asarray(sheet).reshape(-1, 3)
    original = np.asarray(Image.open(folder / "a.png")).reshape(-1, 3)
    assert set(map(tuple, original.tolist())) <= set(map(tuple, colours.tolist()))
    found = survey(folder)
    path = write_stats(collect(found), found, tmp_path / "out")
    assert sorted(file.name for file in path.parent.iterdir()) == ["samples.png", "stats.json"]


def test_a_source_without_a_usable_picture_is_an_error(tmp_path: Path) -> None:
    write_files(tmp_path, {"cat/1.png": b"x"})
    with pytest.raises(DataError, match="no usable picture, 1 bad files"):
        collect(survey(tmp_path))
