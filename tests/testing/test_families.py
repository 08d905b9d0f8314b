"""Every family that comes with nsp passes the conformance suite."""

from dataclasses import replace
from pathlib import Path

import pytest

from nsp.benchmarks.contest import measure as bench
from nsp.benchmarks.contest.steps import group_steps
from nsp.benchmarks.options import QUICK, BenchOptions
from nsp.family.gate import Tokens
from nsp.family.registry import BUILT_IN, family
from nsp.testing import CHECKS, Check, UnderTest

# Their conformance takes a minute each; `make slow` checks it, and so does continuous integration.
_SLOW = ("latent_gpt", "inl_diffusion")
_FAMILIES = [
    pytest.param(name, marks=[pytest.mark.slow] if name in _SLOW else []) for name in BUILT_IN
]


@pytest.fixture(scope="module", params=_FAMILIES)
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
    usual = replace(made.orders[0], sampling=made.pipeline.sampling)
    kinds = [(step.unit, step.latent is not None) for step in made.pipeline.run([usual])]
    assert len(batch.step_rows) == len(group_steps(kinds, made.family.grids(made.config)))
    assert batch.loop is not None
    gates = [stage.gate for stage in made.declared.values()]
    parity, draws_tokens = result.parity, any(isinstance(gate, Tokens) for gate in gates)
    assert parity is not None
    assert parity.has_tokens == parity.forced == draws_tokens
    assert parity.max_relative_error < 1e-3
    assert {"bench.md", "bench.json", "bench.html"} <= {each.name for each in tmp_path.iterdir()}
    joins = "present" in made.family.kv_layouts
    missing = f"the cache of family {made.family.name} is not joined in a graph"
    assert result.others[0].missing == (None if joins else missing)
