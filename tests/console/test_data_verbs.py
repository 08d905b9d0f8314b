import json
import logging
import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import features

from nsp.cli import main
from nsp.data.index import ShardIndex
from nsp.data.shards import find_shards
from nsp.data.sources import open_source
from nsp.data.stats import Stats
from nsp.errors import DataError
from tests.data.picture_files import captioned, encoded, write_files, write_tar

__all__ = ["captioned"]


def _run(*arguments: object) -> Result:
    before = logging.getLogger("nsp").level
    result = CliRunner().invoke(main, ["data", *map(str, arguments)])
    assert logging.getLogger("nsp").level == before
    return result


def test_pack_says_what_it_wrote(captioned: Path, tmp_path: Path) -> None:
    result = _run("pack", captioned, tmp_path / "shards", "--samples-per-shard", 4)
    assert result.exit_code == 0
    assert result.stdout == f"{tmp_path / 'shards'}: 6 samples, 2 shards\n"
    again = _run("pack", captioned, tmp_path / "more", "--shard-size-mb", 1, "--json")
    assert ShardIndex.from_dict(json.loads(again.stdout)).num_samples == 6


def test_stats_shows_a_table_and_gives_json(captioned: Path, tmp_path: Path) -> None:
    write_files(captioned, {"bad.png": b"x", "bad.txt": "bad"})
    output = tmp_path / "out"
    result = _run("stats", captioned, "--output-dir", output)
    assert result.exit_code == 0
    assert "6 (6 to train on)" in result.stdout
    assert "bad.png (not a picture" in result.stdout
    assert f"sample sheet: {output / 'samples.png'}" in result.stdout
    found = json.loads(_run("stats", captioned, "--output-dir", output, "--json").stdout)
    assert found == json.loads((output / "stats.json").read_text("utf-8"))
    assert Stats.from_dict(found).problems == ("bad.png (not a picture Pillow can read)",)


def test_stats_of_a_set_in_which_nothing_can_be_used_says_why(tmp_path: Path) -> None:
    rows = [json.dumps({"file_name": f"{n}.png", "label": "cat"}) for n in range(40)]
    files: dict[str, bytes | str] = {f"{n}.png": encoded(".png") for n in range(40)}
    write_files(tmp_path / "keys", {**files, "metadata.jsonl": "\n".join(rows)})
    bad: dict[str, bytes | str] = {f"c/{n}.png": b"" for n in range(7)}
    write_files(tmp_path / "bad", bad | {f"c/{n}x.png": b"x" for n in range(3)})
    for name, reasons in (
        ("keys", ["40: no text in metadata.jsonl: the row has file_name, label", "0.png, 1.png"]),
        ("bad", ["10 bad files: 7: the file is empty (c/0.png, ", "3: not a picture Pillow can"]),
    ):
        result = _run("stats", tmp_path / name, "--output-dir", tmp_path / "out")
        assert result.exit_code == 1
        line = result.stderr.splitlines()[-1]
        assert line.startswith(f"error: {tmp_path / name}: no usable picture, ")
        assert [reason for reason in reasons if reason not in line] == []
        assert len(line) < 700


def test_a_list_without_end_is_counted_and_told_in_full_in_the_file(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {f"c/{n:03}.png": b"" for n in range(120)}
    files |= {f"c/{n}.md": "x" for n in range(120)} | {"c/good\n.png": encoded(".png")}
    write_files(tmp_path / "set", files)
    result = _run("stats", tmp_path / "set", "--output-dir", tmp_path / "out")
    assert result.exit_code == 0
    assert "120: the file is empty (c/000.png, c/001.png, c/002.png and 117 more)" in result.stdout
    assert "stats.json lists each" in result.stdout
    assert (len(result.stdout.splitlines()), len(result.stdout) < 4000) == (12, True)
    stats = json.loads((tmp_path / "out/stats.json").read_text("utf-8"))
    assert stats["reasons"] == {"the file is empty": 120}
    assert len(stats["problems"]) == 120


def test_a_set_without_captions_is_counted_packed_and_listed_again(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {f"{n}.png": encoded(".png", n) for n in range(3)}
    write_files(tmp_path / "set", files)
    result = _run("stats", tmp_path / "set", "--output-dir", tmp_path / "out")
    assert result.exit_code == 0
    assert ["captions", "none"] in [line.split() for line in result.stdout.splitlines()]
    assert _run("pack", tmp_path / "set", tmp_path / "shards").exit_code == 0
    assert not open_source(tmp_path / "shards").has_captions
    assert not find_shards(tmp_path / "shards").has_captions


def test_names_that_are_not_utf_8_go_through_every_verb(tmp_path: Path) -> None:
    """In Latin-1, as old sets have them: of pictures, class folders, and the set itself."""
    root = tmp_path / os.fsdecode(b"caf\xe9")
    for number, folder in enumerate((b"th\xe9", b"eau")):
        for name in (b"\xe9%d.png" % number, b"%d.png" % number):
            path = root / os.fsdecode(folder) / os.fsdecode(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(".png", number + 10 * len(name)))
        (root / os.fsdecode(folder) / os.fsdecode(b"bad\xe9.png")).write_bytes(b"")
    result = _run("stats", root, "--output-dir", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    stats = json.loads((tmp_path / "out/stats.json").read_text("utf-8"))
    assert stats["classes"] == {"eau": 2, "th\\xe9": 2}
    assert "2: the file is empty (eau/bad\\xe9.png, th\\xe9/bad\\xe9.png)" in result.stdout
    packed = _run("pack", root, tmp_path / "shards", "--skip-bad-files", "--json")
    assert packed.exit_code == 0, packed.stderr
    assert json.loads(packed.stdout)["class_names"] == ["eau", "th\\xe9"]
    names = {sample.name for sample in open_source(tmp_path / "shards").samples}
    assert names == {"eau/1", "eau/\\xe91", "th\\xe9/0", "th\\xe9/\\xe90"}
    write_files(root, {"__heldout__": b"name\tcaption\ncaf\xe9\tx\n"})
    for verb in (["stats", root], ["pack", root, tmp_path / "more"]):
        failed = _run(*verb)
        assert failed.exit_code == 1
        assert failed.stderr.splitlines()[-1].endswith("__heldout__ is not UTF-8; save it as UTF-8")


def test_a_list_of_held_out_samples_that_is_not_utf_8_is_one_line_wherever_it_lies(
    tmp_path: Path,
) -> None:
    wrong = b"name\tcaption\ncaf\xe9\tx\n"
    files: dict[str, bytes | str] = {"a.png": encoded(".png"), "a.txt": "a", "__heldout__": wrong}
    write_tar(tmp_path / "tar/0.tar", files)
    write_files(tmp_path / "beside", {"__heldout__": wrong})
    write_tar(tmp_path / "beside/0.tar", dict(list(files.items())[:2]))
    for spec in (tmp_path / "tar", tmp_path / "tar/0.tar", tmp_path / "beside"):
        with pytest.raises(DataError, match="__heldout__ is not UTF-8; save it as UTF-8"):
            open_source(spec)
    for spec in (tmp_path / "tar", tmp_path / "beside"):
        with pytest.raises(DataError, match="__heldout__ is not UTF-8; save it as UTF-8"):
            find_shards(spec)


def test_an_error_is_one_line(captioned: Path, tmp_path: Path) -> None:
    write_files(captioned, {"bad.png": b"x", "bad.txt": "bad"})
    result = _run("pack", captioned, tmp_path / "shards")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert "bad.png" in result.stderr.splitlines()[-1]
    assert _run("pack", captioned, tmp_path / "shards", "--skip-bad-files").exit_code == 0
    assert _run("pack", captioned, tmp_path / "shards").exit_code == 2
    assert _run("stats", tmp_path / "nowhere").exit_code == 1


def test_build_refuses_what_is_no_font(tmp_path: Path) -> None:
    if not features.check("raqm"):
        pytest.skip("needs Pillow with RAQM")
    (tmp_path / "fake.ttf").write_bytes(encoded(".png"))
    result = _run("build", "--font", tmp_path / "fake.ttf", "--output", tmp_path / "o.tar")
    assert result.exit_code == 1
    assert "fonts-noto-color-emoji" in result.stderr
    assert not (tmp_path / "o.tar").exists()
