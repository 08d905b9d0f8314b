"""A walk ends, counts everything once, and opens nothing, whatever lies in the folder."""

import os
import socket
from pathlib import Path

import pytest

from nsp.errors import DataError
from nsp.walk import Walk, files_below, walk_folder


def _tree(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def test_files_come_sorted_by_their_whole_names_without_hidden_ones(tmp_path: Path) -> None:
    _tree(tmp_path, "b.png", "a/c.png", "a-b/d.png", ".git/x", "a/.DS_Store")
    assert walk_folder(tmp_path) == Walk(["a-b/d.png", "a/c.png", "b.png"])
    assert walk_folder(tmp_path, hidden=True).files[:2] == [".git/x", "a-b/d.png"]
    assert list(files_below(tmp_path))[1] == tmp_path / "a/.DS_Store"


@pytest.mark.parametrize("link", ["a/up", "a/deep/up", "up"])
@pytest.mark.parametrize("target", [".", ".."])
def test_a_link_to_a_folder_above_counts_nothing_twice(
    tmp_path: Path, link: str, target: str
) -> None:
    _tree(tmp_path, "beside.png")
    root = _tree(tmp_path / "root", "1.png", "a/2.png", "a/deep/3.png")
    (root / link).symlink_to((root / target).resolve())
    assert walk_folder(root) == Walk(["1.png", "a/2.png", "a/deep/3.png"], [], [link])


def test_two_links_to_the_folder_itself_do_not_double_at_every_level(tmp_path: Path) -> None:
    _tree(tmp_path, "1.png")
    for number in range(40):
        (tmp_path / f"l{number:02}").symlink_to(".")
    walk = walk_folder(tmp_path)
    assert (walk.files, len(walk.not_followed)) == (["1.png"], 40)


def test_links_that_lead_to_one_another_end(tmp_path: Path) -> None:
    _tree(tmp_path, "x/1.png", "y/2.png", "root/0.png")
    (tmp_path / "x/to_y").symlink_to(tmp_path / "y")
    (tmp_path / "y/to_x").symlink_to(tmp_path / "x")
    (tmp_path / "root/x").symlink_to(tmp_path / "x")
    assert walk_folder(tmp_path / "root").files == ["0.png", "x/1.png", "x/to_y/2.png"]


def test_a_folder_elsewhere_is_followed_once_and_one_in_the_tree_keeps_its_name(
    tmp_path: Path,
) -> None:
    _tree(tmp_path / "elsewhere", "3.png")
    root = _tree(tmp_path / "root", "z/1.png")
    for name, target in (("a", root / "z"), ("b", tmp_path / "elsewhere"), ("c", root / "b")):
        (root / name).symlink_to(target)
    (root / "file.png").symlink_to(tmp_path / "elsewhere/3.png")
    walk = walk_folder(root)
    assert walk.files == ["b/3.png", "file.png", "z/1.png"]
    assert walk.not_followed == ["a", "c"]
    assert walk_folder(root, follow_links=False).not_followed == ["a", "b", "c"]


def test_what_is_no_file_is_reported_and_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "gone.png").symlink_to("nowhere")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s.png"))
        walk = walk_folder(tmp_path)
    assert walk.files == []
    assert [name for name, _ in walk.unusable] == [
        *("gone.png", "loop.png", "pipe.png", "s.png", "zero.png")
    ]
    assert [reason for _, reason in walk.unusable][2:] == [
        *("a FIFO, not a file", "a socket, not a file", "a device, not a file")
    ]


def test_a_folder_that_cannot_be_listed_is_reported_and_the_root_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _tree(tmp_path, "a/1.png", "b/2.png")
    listed = os.scandir

    def closed(folder: Path) -> object:
        if folder.name == "a":
            raise PermissionError(13, "Permission denied", str(folder))
        return listed(folder)

    monkeypatch.setattr(os, "scandir", closed)
    walk = walk_folder(tmp_path)
    assert walk.files == ["b/2.png"]
    assert walk.unusable == [("a", "the folder cannot be listed: Permission denied")]
    with pytest.raises(PermissionError):
        walk_folder(tmp_path / "a")
    with pytest.raises(FileNotFoundError):
        walk_folder(tmp_path / "nowhere")


def test_the_number_of_entries_is_bounded(tmp_path: Path) -> None:
    _tree(tmp_path, *(f"{number}.png" for number in range(9)))
    assert len(walk_folder(tmp_path, most_entries=9).files) == 9
    with pytest.raises(DataError, match="more than 8 files and folders"):
        walk_folder(tmp_path, most_entries=8)


def test_names_that_are_not_utf_8_come_as_the_file_system_has_them(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_text("x")
    assert walk_folder(tmp_path).files == ["caf\udce9.png"]
