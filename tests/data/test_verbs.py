import json
import logging
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import features

from cli import main
from nsp.data.index import ShardIndex
from nsp.data.stats import Stats
from tests.data.picture_files import captioned, encoded, write_files

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
