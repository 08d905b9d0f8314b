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
    few = {"candidate_processes": 0, "baseline_processes": 0, "gemm_side": 64}
    monkeypatch.setattr("nsp.benchmarks.options.QUICK", {**QUICK, **few})
    options = BenchOptions(
        engine_dir=made.engines,
        output_dir=tmp_path,
        checkpoint=made.checkpoint,
        quick=True,
        rounds=2,
        batch_sizes=(1,),
        rivals=("plain-onnx",),
    )
    result = bench.run(options).result
    batch = result.batches[0]
    assert {row.name for row in batch.rows[:-2]} <= {*made.declared}
    assert all(row.speedup for row in batch.rows)
    assert result.model.num_tokens == sum(side**2 for side in result.model.schedule)
    draws_scales = made.family.name == "var"
    assert (result.parity is not None) == bool(batch.scale_rows) == draws_scales
    sentence = "cannot be given the tokens of a whole scale"
    assert (sentence in (tmp_path / "bench.md").read_text()) == (not draws_scales)
    missing = "the cache of family next_scale is not joined in a graph"
    assert result.rivals[0].missing == (None if draws_scales else missing)
