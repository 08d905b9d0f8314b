"""The README's numbers are those of the committed results."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from nsp.benchmarks.readme import RESULTS, ROOT, committed, measured, rewritten, steps
from nsp.errors import ConfigError

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_says_what_the_committed_results_say() -> None:
    assert rewritten(README, committed()) == README, "run: python -m nsp.benchmarks.readme"


def test_another_result_gives_another_table() -> None:
    result = committed()["emoji_cpu.json"]
    batch = result.batches[0]
    row = batch.rows[-1]
    faster = dataclasses.replace(row, contender=dataclasses.replace(row.contender, p50=1.0))
    changed = dataclasses.replace(batch, rows=(*batch.rows[:-1], faster))
    other = dataclasses.replace(result, batches=(changed, *result.batches[1:]))
    assert "| 1 ms" in measured(other)
    assert rewritten(README, {"emoji_cpu.json": other}) != README


def test_the_steps_name_everybody_who_was_timed() -> None:
    result = committed()["w512_cpu.json"]
    text = steps(result)
    for name in result.contenders:
        assert f"| {name}, batch 1 |" in text


def test_a_readme_without_the_marks_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not have the marks"):
        rewritten("# nothing", committed())


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.name)
def test_committed_results_tell_of_no_folder_of_a_machine(path: Path) -> None:
    values = json.loads(path.read_text())
    for name, value in values.get("options", {}).items():
        assert not (isinstance(value, str) and re.search(r"/(tmp|home|root|work)\b", value)), name
