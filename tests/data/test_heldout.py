"""What is held out is never trained on: a list that cannot be read is an error."""

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from nsp.data.heldout import read_heldout
from nsp.data.shards import find_shards
from nsp.data.sources import open_source, survey
from nsp.errors import DataError
from tests.data.picture_files import encoded, write_files, write_tar

LIST = b"name\tcaption\na.png\tred\n"
FILES: dict[str, bytes | str] = {"b.png": encoded(".png"), "b.txt": "green"}


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda path: path.symlink_to("nowhere"), "is a link to nowhere, which does not exist"),
        (lambda path: path.symlink_to(path.name), "is a link that leads back to itself"),
        (lambda path: path.symlink_to("/dev/null"), "is not a regular file but a pipe"),
        (os.mkfifo, "is not a regular file but a pipe"),
        (lambda path: path.mkdir(), "is an empty folder"),
        (lambda path: write_files(path, {"a.png": FILES["b.png"]}), "is a folder of pictures"),
    ],
)
def test_a_list_that_is_no_file_is_an_error_wherever_it_lies(
    tmp_path: Path, make: Callable[[Path], object], what: str
) -> None:
    """Pictures in a folder, shards in a folder, shards as a stream."""
    write_files(tmp_path / "pictures", FILES)
    write_tar(tmp_path / "shards/0.tar", FILES)
    for folder, look in (("pictures", survey), ("shards", survey), ("shards", find_shards)):
        path = tmp_path / folder / "__heldout__"
        if not os.path.lexists(path):
            make(path)
        with pytest.raises(DataError, match=f"__heldout__ {what}.*; a file that lists"):
            look(tmp_path / folder)


def test_a_link_to_a_list_is_read_and_no_list_is_none(tmp_path: Path) -> None:
    write_files(tmp_path, {"list.tsv": LIST, "data/x": ""})
    assert read_heldout(tmp_path / "data") == read_heldout(tmp_path / "nowhere") == []
    (tmp_path / "data/__heldout__").symlink_to("../list.tsv")
    assert read_heldout(tmp_path / "data") == [("a.png", "red")]


def _tar(path: Path, *members: tuple[str, bytes]) -> Path:
    """Write members in their order, of which several may have one name."""
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE])
def test_a_list_in_a_tar_that_is_no_file_is_an_error(tmp_path: Path, kind: bytes) -> None:
    member = tarfile.TarInfo("__heldout__")
    member.type, member.linkname = kind, "list.tsv"
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as archive:
        archive.addfile(member)
    for look in (survey, find_shards):
        with pytest.raises(DataError, match=r"__heldout__ in .*0.tar is not a regular file"):
            look(path)


def test_all_lists_of_a_tar_hold_out_however_they_are_spelled(tmp_path: Path) -> None:
    """`tar cf x.tar .` writes ./__heldout__; tars that were joined hold several."""
    pictures = [(f"{name}.png", encoded(".png", seed)) for seed, name in enumerate("abc")]
    captions = list(zip(("a.txt", "b.txt", "c.txt"), (b"red", b"green", b"blue"), strict=True))
    lists = [("./__heldout__", LIST), ("__heldout__", b"name\tcaption\nx\tblue\n")]
    path = _tar(tmp_path / "0.tar", *lists, *sorted(pictures + captions))
    assert [sample.name for sample in open_source(path).samples] == ["b"]
    assert find_shards(path).heldout.captions == {"red", "blue"}


def test_a_list_beside_a_single_tar_is_heeded(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {}
    for number, name in enumerate(("a", "b")):
        files |= {f"{name}.png": encoded(".png", number), f"{name}.txt": f"caption {name}"}
    write_tar(tmp_path / "set.tar", files)
    (tmp_path / "__heldout__").write_text("name\tcaption\nb\tcaption b\n")
    assert [sample.name for sample in open_source(tmp_path / "set.tar").samples] == ["a"]
