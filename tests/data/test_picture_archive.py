"""Archives of pictures are read and written block by block; bad ones are refused in one line."""

import io
import os
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from nsp.data import picture_archive
from nsp.data.picture_archive import (
    open_pictures,
    part_names,
    read_floats,
    read_text,
    write_pictures,
)
from nsp.errors import DataError

PICTURES = np.random.default_rng(0).integers(0, 256, (7, 5, 4, 3), dtype=np.uint8)


def written(folder: Path, pictures: NDArray[np.uint8] = PICTURES, *, block: int = 3) -> Path:
    path = folder / "pictures.npz"
    blocks = (pictures[start : start + block] for start in range(0, len(pictures), block))
    shape = (len(pictures), *pictures.shape[1:])
    write_pictures(path, blocks, shape=shape, texts={"settings.json": '{"seed": 3}'})
    return path


def saved(folder: Path, **arrays: NDArray[np.generic]) -> Path:
    np.savez(folder / "saved.npz", **arrays)
    return folder / "saved.npz"


@pytest.mark.parametrize("block", [1, 3, 100])
def test_what_was_written_is_read_by_us_and_by_numpy(tmp_path: Path, block: int) -> None:
    path = written(tmp_path, block=block)
    found = open_pictures(path)
    assert found.shape == PICTURES.shape
    assert np.array_equal(np.concatenate(list(found.blocks(2))), PICTURES)
    assert np.array_equal(np.concatenate(list(found.blocks(2, most=5))), PICTURES[:5])
    assert read_text(path, "settings.json") == '{"seed": 3}'
    with np.load(path) as archive:
        assert np.array_equal(archive["arr_0"], PICTURES)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_numpy_wrote_is_read(tmp_path: Path, save: Callable[..., None]) -> None:
    save(tmp_path / "a.npz", PICTURES)
    assert np.array_equal(next(open_pictures(tmp_path / "a.npz").blocks(7)), PICTURES)


def test_equal_pictures_give_equal_bytes(tmp_path: Path) -> None:
    first = written(tmp_path).read_bytes()
    assert written(tmp_path, block=1).read_bytes() == first


def test_memory_is_that_of_one_block(tmp_path: Path) -> None:
    pictures = np.zeros((64, 128, 128, 3), np.uint8)  # 3 MiB
    path = written(tmp_path, pictures)
    tracemalloc.start()
    for block in open_pictures(path).blocks(2):
        assert block.shape[0] == 2
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_small_file_of_very_many_pictures_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(picture_archive, "MAX_PICTURES", 1000)
    for count in (1000, 1001):
        np.savez_compressed(tmp_path / f"{count}.npz", np.zeros((count, 1, 1, 3), np.uint8))
    assert open_pictures(tmp_path / "1000.npz").shape[0] == 1000
    with pytest.raises(DataError, match="an archive has at most 1,000 pictures") as caught:
        open_pictures(tmp_path / "1001.npz")
    assert "\n" not in str(caught.value)


def test_statistics_are_read_with_their_shape(tmp_path: Path) -> None:
    path = saved(tmp_path, mu=np.ones(3, np.float32), sigma=np.eye(3))
    assert part_names(path) == {"mu", "sigma"}
    assert np.array_equal(read_floats(path, "mu", shape=(3,)), np.ones(3))
    with pytest.raises(DataError, match=r"sigma is float64 \(3, 3\); expected float numbers \(4"):
        read_floats(path, "sigma", shape=(4, 4))
    with pytest.raises(DataError, match="mu contains NaN"):
        read_floats(saved(tmp_path, mu=np.full(3, np.nan)), "mu", shape=(3,))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (PICTURES / np.float32(255), "arr_0 is float32 .* must be uint8 numbers from 0 to 255"),
        (PICTURES.astype(np.int64), "arr_0 is int64"),
        (PICTURES.transpose(0, 3, 1, 2).copy(), "must be .number, height, width, 3."),
        (PICTURES[0], "must be .number, height, width, 3."),
        (PICTURES[:0], "there is no picture"),
        (PICTURES.T, "Fortran order"),
        (np.array([{}]), "arr_0 is object"),
    ],
)
def test_another_array_is_refused_in_one_line(
    tmp_path: Path, array: NDArray[np.generic], message: str
) -> None:
    path = saved(tmp_path, arr_0=array)
    with pytest.raises(DataError, match=message) as caught:
        open_pictures(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_array_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path, images=PICTURES)
    with pytest.raises(DataError, match="has no array arr_0; it has images"):
        open_pictures(path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_cut_file_is_refused(tmp_path: Path, share: float) -> None:
    path = written(tmp_path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(DataError, match=r"is empty|cut short|is damaged"):
        open_pictures(path)


def test_a_changed_pixel_is_found(tmp_path: Path) -> None:
    path = written(tmp_path)
    content = bytearray(path.read_bytes())
    content[300] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"is damaged .*CRC"):
        list(open_pictures(path).blocks(3))


def test_a_header_that_promises_more_than_the_file_has_is_refused(tmp_path: Path) -> None:
    header = io.BytesIO()
    shape = (10**9, 512, 512, 3)
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue() + b"12345")
    with pytest.raises(DataError, match="has 5 bytes of it"):
        open_pictures(tmp_path / "a.npz")


def test_other_files_are_named_for_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "page.npz").write_text("<!doctype html><html></html>")
    with pytest.raises(DataError, match="is a web page"):
        open_pictures(tmp_path / "page.npz")
    np.save(tmp_path / "a.npy", PICTURES)
    with pytest.raises(DataError, match=r"an .npz archive is needed"):
        open_pictures(tmp_path / "a.npy")
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(OSError, match="not a regular file"):
        open_pictures(tmp_path / "pipe.npz")


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def blocks():
        yield PICTURES
        raise RuntimeError("no power")

    with pytest.raises(RuntimeError, match="no power"):
        write_pictures(tmp_path / "a.npz", blocks(), shape=(14, 5, 4, 3))
    assert list(tmp_path.iterdir()) == []
