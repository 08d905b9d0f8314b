import json
from pathlib import Path

from click.testing import CliRunner

from nsp.benchmarks.rates.loader import LoaderReport
from nsp.cli import main
from tests.data.picture_files import encoded, write_files


def test_every_loader_is_measured_beside_the_consumption(tmp_path: Path) -> None:
    files: dict[str, bytes | str] = {}
    for number in range(20):
        files |= {f"{number}.png": encoded(".png", number), f"{number}.txt": f"picture {number}"}
    source = write_files(tmp_path, files)
    options = ["bench", "loader", "--source", str(source), "--image-size", "8", "--batch-size", "4"]
    options += ["--workers", "0", "--seconds", "0.1", "--consumption", "10"]
    result = CliRunner().invoke(main, [*options, "--json"])
    assert result.exit_code == 0, result.output
    report = LoaderReport.from_dict(json.loads(result.stdout))
    assert [rate.loader for rate in report.rates] == [
        "map-style, decoding",
        "map-style, cached",
        "stream",
    ]
    for rate in report.rates:
        assert rate.images_per_s > 0
        assert rate.of_consumption == rate.images_per_s / 10
    assert report.trusted == (not report.warnings)
    table = CliRunner().invoke(main, options).stdout
    assert "images/s" in table
    assert "{" not in table


def test_a_source_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["bench", "loader", "--source", str(tmp_path / "nowhere")])
    assert result.exit_code == 1
    assert "nowhere does not exist" in result.stderr


def test_a_measurement_that_would_not_end_is_refused() -> None:
    result = CliRunner().invoke(main, ["bench", "loader", "--seconds", "nan"])
    assert result.exit_code == 2
    assert "seconds must be a number from 0.01 to 3600, not nan" in result.output
