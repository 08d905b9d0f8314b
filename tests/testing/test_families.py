"""Every family that comes with nsp passes the conformance suite."""

from pathlib import Path

import pytest

from nsp.benchmarks.contest import measure as bench
from nsp.benchmarks.options import QUICK, BenchOptions
from nsp.family.registry import BUILT_IN, family
from nsp.testing import CHECKS, Check, UnderTest


@pytest.fixture(scope="module", params=[*BUILT_IN])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> UnderTest:
    return UnderTest(family(request.param), tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_family_keeps_it(check: Check, made: UnderTest) -> None:
    check(made)


def test_its_engines_are_timed_beside_pytorch(
    made: UnderTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"engine_processes": 0, "baseline_processes": 0, "gemm_side": 64}
    monkeypatch.setattr("nsp.benchmarks.options.QUICK", {**QUICK, **few})
    options = BenchOptions(
        engine_dir=made.engines,
        output_dir=tmp_path,
        checkpoint=made.checkpoint,
        quick=True,
        rounds=2,
        batch_sizes=(1,),
        contenders=("plain-onnx",),
    )
    result = bench.run(options).result
    batch = result.batches[0]
    assert {row.name for row in batch.rows[:-2]} <= {*made.declared}
    assert all(row.speedup for row in batch.rows)
    assert result.model.num_tokens == sum(side**2 for side in result.model.schedule)
    assert len(batch.step_rows) == len(result.model.schedule)
    assert batch.loop is not None
    parity, draws_tokens = result.parity, made.family.name == "var"
    assert parity is not None
    assert parity.has_tokens == parity.forced == draws_tokens
    assert parity.max_relative_error < 1e-3
    assert {"bench.md", "bench.json", "bench.html"} <= {each.name for each in tmp_path.iterdir()}
    missing = "the cache of family next_scale is not joined in a graph"
    assert result.others[0].missing == (None if draws_tokens else missing)
