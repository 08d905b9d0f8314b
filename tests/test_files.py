"""Files are read with their damage named, and written whole or not at all."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from nsp.files import (
    inside,
    locked_file,
    name_failed_write,
    read_json,
    write_file,
    write_folder,
)
from tests.disk import largest_file


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Expecting value"),
        (b"[1]", "list instead of an object"),
        (b"3", "int instead of an object"),
        (b"\xff", "utf-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 200 + b"1" + b"}" * 200, "nested deeper than 64"),
        (b'{"a": "\\ud800"}', "surrogates"),
        (b'{"a": ' + b"1" * 5000 + b"}", "4300 digits"),
    ],
)
def test_what_is_no_usable_json_object_is_a_value_error(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=reason) as caught:
        read_json(path)
    assert "\n" not in str(caught.value)


def test_a_json_object_is_read_as_it_is(tmp_path: Path) -> None:
    values = {"a": [1, 2.5, None, {"b": "é 🍎"}]}
    (tmp_path / "a.json").write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    assert read_json(tmp_path / "a.json") == values


def test_a_file_in_the_way_of_a_folder_stays(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("mine")
    with pytest.raises(NotADirectoryError) as caught, write_folder(path):
        pass
    assert caught.value.filename == str(path)
    assert path.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with (
        largest_file(100),
        pytest.raises(OSError, match="File too large") as caught,
        write_file(path) as partial,
    ):
        partial.write_bytes(bytes(1000))
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_names_the_weights_by_their_final_name(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    with (
        largest_file(100),
        pytest.raises(OSError, match="File too large") as caught,
        write_folder(folder) as partial,
        name_failed_write(partial / "model.safetensors"),
    ):
        save_file({"a": np.zeros(1000)}, partial / "model.safetensors")
    assert caught.value.filename == str(folder / "model.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_an_error_about_another_file_keeps_its_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, write_folder(tmp_path / "out"):
        (tmp_path / "source").read_bytes()
    assert caught.value.filename == os.fspath(tmp_path / "source")


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "..", "a/../b", "a//b", "a/./b", "", "a\0b", "//a"]
)
def test_a_name_that_leads_out_of_a_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="leads outside the folder"):
        inside(tmp_path, name)


def test_a_name_behind_a_link_is_refused_and_a_linked_folder_is_not(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/link").symlink_to(tmp_path / "mine")
    (tmp_path / "theirs/broken").symlink_to(tmp_path / "nowhere")
    for name in ("link", "link/file", "broken"):
        with pytest.raises(ValueError, match="symbolic link"):
            inside(tmp_path / "theirs", name)
    (tmp_path / "short").symlink_to(tmp_path / "mine")
    assert inside(tmp_path / "short", "a/file") == tmp_path / "short/a/file"


def test_json_is_read_from_regular_files_only(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    for name in ("pipe", "endless"):
        with pytest.raises(OSError, match="not a regular file"):
            read_json(tmp_path / name)


def test_a_lock_is_held_once_and_keeps_what_its_file_holds(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text("kept")
    with locked_file(path) as first, locked_file(path) as second:
        assert (first, second) == (True, False)
    with locked_file(path) as again:
        assert again
    assert path.read_text() == "kept"


def test_a_lock_never_touches_a_file_behind_a_link_nor_waits_for_a_pipe(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe"):
        with pytest.raises(OSError), locked_file(tmp_path / name):  # noqa: PT011
            pass
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_file_written_by_safetensors_has_the_mode_of_all_others(tmp_path: Path) -> None:
    with write_file(tmp_path / "a.safetensors") as partial:
        save_file({"a": np.zeros(3)}, partial)
    (tmp_path / "plain").write_text("")
    modes = [(tmp_path / name).stat().st_mode for name in ("a.safetensors", "plain")]
    assert modes[0] == modes[1]
