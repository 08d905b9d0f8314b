"""Recall counts what it says: the named picture, or one that looks the same, among the nearest."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsp.data.retrieval import PictureSet, Recall, psnr_db
from nsp.data.sources import open_source
from tests.data.picture_files import write_captioned

NAMES = [f"{name}.png" for name in "abcde"]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return write_captioned(tmp_path / "pictures")


def test_a_picture_is_nearest_to_itself_and_to_those_that_look_the_same(pictures: Path) -> None:
    source = open_source(pictures, split="all")
    found = PictureSet.of(source)
    assert len(found.pixels) == 4
    images = [found.picture(name) for name in NAMES]
    assert found.ranks(images, NAMES).tolist() == [0] * 5
    assert found.ranks([found.picture("b.png")], ["e.png"]).tolist() == [0]
    far = found.ranks([found.picture("a.png")] * 3, ["b.png", "c.png", "d.png"])
    assert sorted(far.tolist()) == [1, 2, 3]
    noisy = np.clip(found.picture("c.png").astype(int) + 9, 0, 255).astype(np.uint8)
    assert found.ranks([noisy], ["c.png"]).tolist() == [0]


@given(hits=st.integers(0, 50), misses=st.integers(0, 50))
def test_the_interval_holds_the_share(hits: int, misses: int) -> None:
    if hits + misses == 0:
        return
    recall = Recall.at(np.array([0] * hits + [7] * misses), 5)
    assert recall.share == hits / (hits + misses)
    assert 0 <= recall.low <= recall.share + 1e-12
    assert recall.share - 1e-12 <= recall.high <= 1


def test_the_interval_is_wilsons() -> None:
    recall = Recall.at(np.array([0] * 90 + [1] * 10), 1)
    assert (recall.low, recall.high) == pytest.approx((0.8256, 0.9448), abs=1e-4)


def test_psnr_of_equal_pictures_is_its_largest() -> None:
    black = np.zeros((4, 4, 3), np.uint8)
    assert psnr_db(black, black) == pytest.approx(100)
    assert psnr_db(black, black + 255) == pytest.approx(0)
