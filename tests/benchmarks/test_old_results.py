"""Results of earlier versions and of other programs are refused by name."""

import json
from pathlib import Path

import pytest

from nsp.benchmarks.record.result import read_result
from nsp.benchmarks.record.schema import SCHEMA
from nsp.errors import ConfigError


@pytest.mark.parametrize("schema", [None, 1, 2, 3, 9])
def test_another_schema_is_refused_with_the_command(tmp_path: Path, schema: int | None) -> None:
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"schema_version": schema, "batches": []}))
    words = f"has schema_version {schema}, but this nsp reads {SCHEMA}; measure again: nsp bench"
    with pytest.raises(ConfigError, match=f"bench.json is not a benchmark result.*{words}"):
        read_result(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"schema_version": 1, "parts": []}, "growth of one picture, by a program that nsp bench"),
        ({"schema_version": 1, "contests": []}, "the GPU suite before schema 4"),
        ({"schema_version": 1, "splits": []}, "nsp bench fidelity"),
        ({"rates": []}, "nsp bench loader"),
    ],
)
def test_other_results_are_refused_by_name(tmp_path: Path, content: object, words: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=f"other.json is not a benchmark result.*{words}"):
        read_result(path)
