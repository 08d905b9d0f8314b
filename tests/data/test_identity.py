"""A set is known by what is in it: moved it is the same, changed it says what changed."""

import json
import shutil
from pathlib import Path

import pytest

from nsp.data.identity import describe_change
from nsp.data.pack import pack
from nsp.data.shards import find_shards
from nsp.data.sources import open_source
from tests.data.picture_files import encoded, write_files, write_tar


def _set(root: Path, count: int = 4) -> Path:
    files: dict[str, bytes | str] = {}
    for number in range(count):
        files |= {f"{number:02}.png": encoded(".png", number), f"{number:02}.txt": f"no {number}"}
    return write_files(root, files)


def _change(before: Path, after: Path) -> str | None:
    old, new = (json.loads(json.dumps(open_source(each).identity())) for each in (before, after))
    return describe_change(old, new)


def test_a_set_that_was_moved_is_the_same_and_its_record_names_no_path(tmp_path: Path) -> None:
    root = _set(tmp_path / "set")
    record = open_source(root).identity()
    shutil.move(root, tmp_path / "elsewhere")
    assert open_source(tmp_path / "elsewhere").identity() == record
    assert str(tmp_path) not in json.dumps(record)
    assert record["num_samples"] == 4


@pytest.mark.parametrize(
    ("files", "gone", "change"),
    [
        ({"04.png": encoded(".png", 4), "04.txt": "no 4"}, [], "1 picture more: 04.png"),
        ({"01.png": encoded(".png", 9)}, [], "1 picture replaced: 01.png"),
        (
            {"01.png": encoded(".png", 8), "02.png": encoded(".png", 9)},
            [],
            "2 pictures replaced: 01.png, 02.png",
        ),
        ({"03.txt": "no 7"}, [], "1 caption changed: 03.png"),
        ({}, ["00", "02", "03"], "3 pictures gone: 00.png, 02.png, 03.png"),
        (
            {"9.png": encoded(".png"), "9.txt": "x", "03.txt": "y"},
            ["02"],
            "1 picture more: 9.png; 1 picture gone: 02.png; 1 caption changed: 03.png",
        ),
    ],
)
def test_a_change_is_said(
    tmp_path: Path, files: dict[str, bytes | str], gone: list[str], change: str
) -> None:
    before = _set(tmp_path / "before")
    after = write_files(_set(tmp_path / "after"), files)
    for name in gone:
        (after / f"{name}.png").unlink()
        (after / f"{name}.txt").unlink()
    assert _change(before, before) is None
    assert _change(before, after) == change


def test_an_order_and_a_class_that_changed_are_said(tmp_path: Path) -> None:
    rows = [json.dumps({"file_name": f"{n}.png", "text": str(n)}) for n in range(3)]
    pictures = {f"{n}.png": encoded(".png", n) for n in range(3)}
    for name, lines in (("a", rows), ("b", rows[::-1])):
        write_files(tmp_path / name, {**pictures, "metadata.jsonl": "\n".join(lines)})
    assert _change(tmp_path / "a", tmp_path / "b") == "pictures are in another order"
    write_files(tmp_path / "c", {"cat/1.png": pictures["1.png"], "dog/2.png": pictures["2.png"]})
    write_files(tmp_path / "d", {"cat/1.png": pictures["1.png"], "dog/2.png": pictures["2.png"]})
    write_files(tmp_path / "d", {"ant/0.png": pictures["0.png"]})
    assert _change(tmp_path / "c", tmp_path / "d") == (
        "1 picture more: ant/0.png; 2 classes changed: cat/1.png, dog/2.png"  # their numbers
    )


def test_what_is_too_large_to_be_listed_is_still_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nsp.data.identity._MOST_NAMES", 3)
    before, after = _set(tmp_path / "before"), _set(tmp_path / "after", 5)
    assert _change(before, after) == "1 picture more"
    assert _change(after, before) == "1 picture gone"
    monkeypatch.setattr("nsp.data.identity._MOST_SAMPLES", 3)
    assert _change(before, after) == "4 pictures then, 5 now"
    (after / "04.png").unlink()
    write_files(after, {"03.png": encoded(".png", 9)})
    (after / "04.txt").unlink()
    assert _change(before, after) == "pictures are others, or in another order"
    damaged = {"kind": "pictures", "digest": "", "num_samples": 4, "samples": 5, "names": [1]}
    assert describe_change(damaged, open_source(after).identity()) is not None


def test_shards_are_known_by_their_index_or_by_their_sizes(tmp_path: Path) -> None:
    pack(_set(tmp_path / "set"), tmp_path / "packed", samples_per_shard=2)
    packed = find_shards(tmp_path / "packed").identity()
    shutil.copytree(tmp_path / "packed", tmp_path / "copied")
    assert find_shards(tmp_path / "copied").identity() == packed
    assert all(len(sha256) == 64 for _, _, sha256 in packed["shards"])
    pack(_set(tmp_path / "set", 5), tmp_path / "other", samples_per_shard=2)
    change = describe_change(packed, find_shards(tmp_path / "other").identity())
    assert change is not None
    assert "1 shard more: train-000002.tar" in change
    plain = tmp_path / "plain"
    plain.mkdir()
    write_tar(plain / "a.tar", {"a.png": encoded(".png"), "a.txt": "a"})
    before = find_shards(plain).identity()
    write_tar(plain / "a.tar", {"a.png": encoded(".png"), "a.txt": "a" * 20000})
    after = find_shards(plain).identity()
    assert before["shards"] == [["a.tar", 10240, ""]]
    assert describe_change(before, after) == "1 shard replaced: a.tar"
    listed = open_source(tmp_path / "set").identity()
    assert describe_change(listed, packed) == "listed pictures then, a stream of shards now"
