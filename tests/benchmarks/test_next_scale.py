"""What growing a picture costs, part by part."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from nsp.artifacts.checkpoint import read_checkpoint
from nsp.benchmarks.next_scale import Growth, growth_table, main, measure, read_growth
from nsp.errors import ConfigError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("growth")


@pytest.fixture(scope="module")
def growth(folder: Path) -> Growth:
    arguments = ["--size", "tiny", "--threads", "1"]
    folders = ["--output-dir", str(folder), "--checkpoint-dir", str(folder / "weights")]
    result = CliRunner().invoke(main, [*arguments, *folders])
    assert result.exit_code == 0, result.output
    return read_growth(folder / "next_scale.json")


def test_every_scale_and_the_decoder_have_a_line(growth: Growth, folder: Path) -> None:
    names = ["weights", "latent 2x2", "latent 4x4", "latent 8x8", "decoder, 16 px"]
    assert [part.name for part in growth.parts] == names
    table = growth_table(growth)
    assert table + "\n" == (folder / "next_scale.md").read_text()
    assert all(f"| {name} |" in table for name in names)


def test_the_peak_never_falls_and_the_picture_is_all_but_the_weights(growth: Growth) -> None:
    peaks = [part.peak_gib for part in growth.parts]
    assert peaks == sorted(peaks)
    assert growth.peak_gib == peaks[-1] > 0
    assert growth.picture_s == sum(part.seconds for part in growth.parts[1:])


@pytest.mark.usefixtures("growth")
def test_the_weights_are_kept_to_be_exported(folder: Path) -> None:
    assert read_checkpoint(folder / "weights").family.name == "next_scale"


def test_an_unknown_size_is_named() -> None:
    with pytest.raises(ConfigError, match="unknown size 'huge'; known: sdxl"):
        measure("huge", threads=1)


def test_a_result_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_text("{}")
    with pytest.raises(
        ConfigError, match=r"bench.json is not a result of nsp.benchmarks.next_scale"
    ):
        read_growth(path)
