"""Results of earlier versions are read, or refused by name; none of them is trusted unread."""

import dataclasses
import json
from pathlib import Path

import pytest

from nsp.benchmarks.readme import RESULTS
from nsp.benchmarks.record.growth import read_growth
from nsp.benchmarks.record.old import READABLE
from nsp.benchmarks.record.result import read_result
from nsp.errors import ConfigError

OLD = RESULTS / "emoji_cpu.json"


def test_an_earlier_schema_is_read_with_its_parts_and_rows() -> None:
    values = json.loads(OLD.read_text())
    if values["schema_version"] not in READABLE:
        pytest.skip("the committed result is of this schema")
    found = read_result(OLD)
    batch = found.batches[0]
    assert found.contender == "onnxruntime"
    assert [part.name for part in batch.parts if part.unit] == [row.name for row in batch.step_rows]
    assert {part.name for part in batch.parts if part.unit is None} == {
        "text_encoder",
        "condition",
        "decoder",
    }
    assert batch.parts[-1].name == "decoder"
    assert batch.loop is not None
    assert batch.loop.cost is not None
    assert batch.loop.contender.p50 < batch.end_to_end.contender.p50
    assert found.parity is not None
    assert found.parity.steps[0].name == "1x1"
    assert found.trusted == (not found.warnings)
    assert found.environment.instructions is None  # and so it is compared with no other kind


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"schema_version": 9, "batches": []}, "schema_version 9, but this nsp reads 1, 2, 3 and"),
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


def test_the_growth_of_a_large_picture_is_still_read(tmp_path: Path) -> None:
    growth = read_growth(RESULTS / "next_scale_1024_cpu.json")
    assert growth.picture_s == sum(part.seconds for part in growth.parts[1:])
    assert growth.peak_gib == max(part.peak_gib for part in growth.parts)
    path = tmp_path / "bench.json"
    path.write_text("{}")
    with pytest.raises(ConfigError, match=r"bench.json is not a result of one large picture"):
        read_growth(path)
    with pytest.raises(ConfigError, match="schema_version 2"):
        dataclasses.replace(growth, schema_version=2)
