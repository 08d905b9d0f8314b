import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from nsp.benchmarks.record.compare import Ratio, compare_results, parse_threshold
from nsp.benchmarks.record.result import BenchResult, Part
from nsp.benchmarks.record.rows import batch_result
from nsp.benchmarks.record.times import Observation
from nsp.benchmarks.render.comparison import comparison_sections
from nsp.cli import main
from nsp.errors import ConfigError

ROUNDS = 30


def observed(
    result: BenchResult,
    *,
    engines: float = 1.0,
    machine: float = 1.0,
    seed: int = 0,
    **changes: Any,
) -> BenchResult:
    """Return `result` with made-up times: engines and the whole machine so many times as slow."""
    rng = np.random.default_rng(seed)
    observations = []
    for number in range(ROUNDS):
        weather = machine * rng.uniform(0.8, 1.3)  # shared by everybody in the round
        for place, (name, base) in enumerate(((result.contender, 50 * engines), ("torch", 100))):
            wall = base * weather * rng.normal(1, 0.01)
            stages = {"step": (0.6 * wall,), "decoder": (0.3 * wall,)}
            observations.append(
                Observation(
                    contender=name, round=number, place=place, wall_ms=wall, stage_ms=stages
                )
            )
    parts = [
        Part(name=stage, unit=unit, calls={stage: (0, 1)}, costs={})
        for stage, unit in (("step", "scale"), ("decoder", None))
    ]
    batch = batch_result(observations, parts, batch=1, contender=result.contender, baseline="torch")
    return dataclasses.replace(result, batches=(batch,), warnings=(), trusted=True)


def verdict(old: BenchResult, new: BenchResult, threshold: float = 0.05) -> str:
    return compare_results(old, new, threshold=threshold).verdicts[1]


def test_a_change_of_the_engines_is_told_from_chance(result: BenchResult) -> None:
    old = observed(result)
    assert verdict(old, observed(result, seed=1)) == "same"
    assert verdict(old, observed(result, engines=1.1, seed=1)) == "slower"
    assert verdict(old, observed(result, engines=1.1, seed=1), threshold=0.2) == "same"
    assert verdict(old, observed(result, engines=0.8, seed=1)) == "faster"


def test_a_slower_machine_is_no_regression_while_the_baseline_tells_of_it(
    result: BenchResult,
) -> None:
    old, new = observed(result), observed(result, machine=1.5, seed=1)
    found = compare_results(old, new, threshold=0.05)
    assert found.verdicts == {1: "same"}
    (change,) = found.batches
    assert change.adjusted
    assert change.baseline is not None
    assert 1.3 < change.plain.value < 1.7
    assert 1.3 < change.baseline.value < 1.7
    assert change.gate.low <= change.gate.value <= change.gate.high
    other = dataclasses.replace(
        new.environment, packages={**new.environment.packages, "torch": "9.9"}
    )
    changed = dataclasses.replace(new, environment=other)
    found = compare_results(old, changed, threshold=0.05)  # another baseline measures nothing
    assert not found.batches[0].adjusted
    assert found.verdicts == {1: "slower"}
    assert any("torch: " in note and "9.9" in note for note in found.notes)


def test_stages_are_compared_one_by_one(result: BenchResult) -> None:
    found = compare_results(observed(result), observed(result, engines=2, seed=1), threshold=0.05)
    assert set(found.batches[0].stages) == {"step", "decoder"}
    assert all(1.7 < ratio.value < 2.3 for ratio in found.batches[0].stages.values())


def test_the_interval_holds_the_truth_about_as_often_as_it_says(result: BenchResult) -> None:
    held = 0
    for seed in range(20):
        old, new = observed(result, seed=2 * seed + 10), observed(result, seed=2 * seed + 11)
        ratio = compare_results(old, new, threshold=0.05).batches[0].gate
        held += ratio.low <= 1 <= ratio.high
    assert held >= 15


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("weights", "f" * 64, "weights: "),
        ("seed", 7, "seed: 0 and 7"),
        ("schedule", (1, 2), "schedule: "),
        ("image_size_px", 512, "image size px: "),
        ("timing_boundary", "without the decoder", "timing boundary: "),
        ("conditions", ("a dove",), "prompts: "),
        ("machine", {"processor": "another"}, "machine processor: "),
        ("machine", {"processor's kind": "AVX2"}, "machine processor's kind: .* and AVX2"),
        ("sampling", {"top_k": "3"}, "sampling top_k: "),
    ],
)
def test_different_contracts_are_refused_by_name(
    result: BenchResult, field: str, value: Any, said: str
) -> None:
    old = observed(result)
    assert old.contract is not None
    contract = dataclasses.replace(old.contract, **{field: value})
    with pytest.raises(ConfigError, match=f"different things.*{said}"):
        compare_results(old, dataclasses.replace(old, contract=contract), threshold=0.05)


def test_results_that_cannot_be_judged_are_refused(result: BenchResult) -> None:
    old = observed(result)
    with pytest.raises(ConfigError, match="does not record exactly what was measured"):
        compare_results(dataclasses.replace(old, contract=None), old, threshold=0.05)
    with pytest.raises(ConfigError, match="3 rounds of batch 1"):
        compare_results(old, dataclasses.replace(result, trusted=True), threshold=0.05)
    other = dataclasses.replace(old, batches=(dataclasses.replace(old.batches[0], batch=2),))
    with pytest.raises(ConfigError, match="no batch size"):
        compare_results(old, other, threshold=0.05)


def test_a_result_that_is_not_trusted_is_compared_only_when_asked(result: BenchResult) -> None:
    old = observed(result)
    doubted = dataclasses.replace(old, trusted=False, warnings=("another process worked", "b", "c"))
    words = "new result cannot be trusted: another process worked, and 2 more reasons; .*--anyway"
    with pytest.raises(ConfigError, match=words):
        compare_results(old, doubted, threshold=0.05)
    found = compare_results(old, doubted, threshold=0.05, anyway=True)
    assert not found.trusted
    assert next(comparison_sections(found)).title.endswith("not to be trusted")
    assert compare_results(old, old, threshold=0.05).trusted


def test_a_change_that_chance_could_have_made_is_unclear() -> None:
    assert Ratio(value=1.1, low=0.98, high=1.2).verdict(0.05) == "unclear"
    assert Ratio(value=1.1, low=1.01, high=1.2).verdict(0.05) == "slower"
    assert Ratio(value=0.9, low=0.8, high=1.01).verdict(0.05) == "unclear"
    assert Ratio(value=1.04, low=1.03, high=1.05).verdict(0.05) == "same"


def test_the_command_is_a_gate(result: BenchResult, tmp_path: Path) -> None:
    paths = []
    for name, found in (("old", observed(result)), ("new", observed(result, engines=1.2, seed=1))):
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(found.to_dict()))
    old, new = map(str, paths)

    def nsp(*words: str) -> Any:
        return CliRunner().invoke(main, ["bench", *words])

    slower = nsp("compare", old, new)
    assert slower.exit_code == 1
    assert "error: slower than" in slower.stderr
    assert "batch size 1" in slower.stderr
    assert "slower" in slower.stdout
    assert nsp("compare", old, new, "--threshold", "30%").exit_code == 0
    assert nsp("--compare", new, old).exit_code == 0
    asked = nsp("--compare", old, new, "--threshold", "0.3", "--json")
    assert json.loads(asked.stdout)["verdicts"] == {"1": "same"}
    paths[0].write_text("{}")
    refused = nsp("compare", old, new)
    assert refused.exit_code == 2
    assert "not a benchmark result" in refused.stderr


def test_folders_of_nsp_bench_are_compared_too(result: BenchResult, tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "bench.json").write_text(json.dumps(observed(result).to_dict()))
    command = ["bench", "compare", str(tmp_path / "old")]
    same = CliRunner().invoke(main, [*command, str(tmp_path / "new"), "--json"])
    assert json.loads(same.stdout)["verdicts"] == {"1": "same"}
    none = CliRunner().invoke(main, [*command, str(tmp_path)])
    assert none.exit_code == 2
    assert f"{tmp_path / 'bench.json'} does not exist; nsp bench writes it" in none.stderr


@pytest.mark.parametrize(("text", "value"), [("5%", 0.05), ("0.1", 0.1), (" 2.5 % ", 0.025)])
def test_thresholds_are_shares(text: str, value: float) -> None:
    assert parse_threshold(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "five", "150%", "-1%", "nan"])
def test_other_thresholds_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="threshold"):
        parse_threshold(text)
