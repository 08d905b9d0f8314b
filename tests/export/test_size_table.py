"""The README's table of sizes is what `nsp plan` says now."""

import json
from pathlib import Path

import pytest

from nsp.errors import ConfigError
from nsp.export.size_table import PLACE, plan_row, read_sizes, size_table
from nsp.family.registry import BUILT_IN, family


def test_every_size_of_every_family_has_a_row() -> None:
    sizes = {f"{name}/{size}" for name in BUILT_IN for size in family(name).sizes}
    rows = {plan["model"] for plan in read_sizes(PLACE)}
    assert rows == {each for each in sizes if not each.endswith("/tiny")}
    table = size_table(read_sizes(PLACE))
    assert all(f"| `{row}` |" in table for row in rows)


def test_a_committed_row_is_what_is_planned_now() -> None:
    committed = {plan["model"]: plan for plan in read_sizes(PLACE)}["var/w512"]
    now = plan_row("var/w512")
    for name in ("weights", "arena", "flop", "floor_ms"):
        assert now[name] == committed[name], "run: python -m nsp.export.size_table"
    # What an operator needs for itself changes with PyTorch.
    assert now["peak"] == pytest.approx(committed["peak"], rel=0.1)


def test_a_file_without_plans_names_the_command(tmp_path: Path) -> None:
    (tmp_path / "sizes.json").write_text(json.dumps({}))
    with pytest.raises(ConfigError, match=r"run: python -m nsp\.export\.size_table"):
        read_sizes(tmp_path / "sizes.json")
