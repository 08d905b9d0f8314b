"""The README's numbers are those of the committed results."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from benchmarks.readme import RESULT, ROOT, measured, rewritten
from benchmarks.results import read_result
from nsp.errors import ConfigError

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_says_what_the_committed_result_says() -> None:
    assert rewritten(README, read_result(RESULT)) == README, "run: python -m benchmarks.readme"


def test_another_result_gives_another_table() -> None:
    result = read_result(RESULT)
    batch = result.batches[0]
    row = batch.rows[-1]
    faster = dataclasses.replace(row, candidate=dataclasses.replace(row.candidate, p50=1.0))
    changed = dataclasses.replace(batch, rows=(*batch.rows[:-1], faster))
    other = dataclasses.replace(result, batches=(changed, *result.batches[1:]))
    assert "| 1 ms" in measured(other)
    assert rewritten(README, other) != README


def test_a_readme_without_the_marks_is_refused() -> None:
    with pytest.raises(ConfigError, match="lacks the marks"):
        rewritten("# nothing", read_result(RESULT))


@pytest.mark.parametrize("path", sorted(RESULT.parent.glob("*.json")), ids=lambda path: path.name)
def test_committed_results_tell_of_no_folder_of_a_machine(path: Path) -> None:
    values = json.loads(path.read_text())
    for name, value in values.get("options", {}).items():
        assert not (isinstance(value, str) and re.search(r"/(tmp|home|root|work)\b", value)), name
