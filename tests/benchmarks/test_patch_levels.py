"""What levels of patches save is counted, and is what the paper says."""

import json

import pytest
from click.testing import CliRunner

from nsp.cli import main

# Cost of a run over that of one without levels, epoch rate 0.5 (arXiv:2412.15321, by tokens).
PUBLISHED = {1: 1.0, 2: 0.625, 3: 0.578, 4: 0.572}


def test_counted_costs_are_near_the_published_ones() -> None:
    arguments = ["bench", "levels", "--family", "next_patch", "--size", "B"]
    found = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).stdout)
    for each in found["levels"]:
        published = PUBLISHED[each["patch_level"]]
        assert each["of_tokens"] == pytest.approx(published, abs=6e-4)
        assert each["relative"] == pytest.approx(published, abs=5e-3)
    flop = found["flop_per_picture"]
    # Weights of the blocks and the output, once per position and number, forward and backward.
    weights = 110_888_448 - (16384 + 1001) * 768
    assert flop["1"] == pytest.approx(6 * weights * 256, rel=0.07)
    assert "patch level 4: 0.570" in CliRunner().invoke(main, arguments).stdout


@pytest.mark.parametrize(
    ("family", "size", "message"),
    [
        ("next_patch", "tiny", "reads captions"),
        ("next_patch", "GPT", "size of family next_patch"),
        ("var", "d16", "does not draw codes in raster order"),
    ],
)
def test_models_without_levels_are_named(family: str, size: str, message: str) -> None:
    arguments = ["bench", "levels", "--family", family, "--size", size]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code
    assert message in result.stderr
