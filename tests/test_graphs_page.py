"""docs/graphs.md lists the tensors that the families declare."""

import re
from pathlib import Path

import pytest

from nsp.family.registry import BUILT_IN, family

PAGE = Path(__file__).parents[1] / "docs/graphs.md"
ROW = re.compile(r"\| (in|out) \| `(\w+)` \| ([^|]+) \| (\w+) \|")


def written(name: str) -> dict[str, set[tuple[str, str, str, str]]]:
    """Return the rows of every stage's table in the family's section."""
    section = PAGE.read_text().split(f"\n## `{name}`\n")[1].split("\n## ")[0]
    stages = re.split(r"\n### `(\w+)`\n", section)
    return {
        stage: {(side, tensor, axes, dtype) for side, tensor, axes, dtype in ROW.findall(table)}
        for stage, table in zip(stages[1::2], stages[2::2], strict=True)
    }


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_page_shows_every_tensor_of_every_stage(name: str) -> None:
    owner = family(name)
    declared = {}
    stages = owner.stages(owner.sizes["emoji"], kv_layout="delta", dtype="float32")
    for stage, each in stages.items():
        tensors = [("in", *item) for item in each.io.inputs.items()]
        tensors += [("out", *item) for item in each.io.outputs.items()]
        declared[stage] = {
            (
                side,
                re.sub(r"^((?:past|new|cross)_[kv]_)\d+$", r"\1i", tensor),
                (spec.axes or "(scalar)").replace("*", "·"),
                spec.dtype,
            )
            for side, tensor, spec in tensors
        }
    assert written(name) == declared
