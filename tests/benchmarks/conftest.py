"""A tiny model as two pipelines, and one small benchmark of them, shared by the tests."""

from pathlib import Path
from typing import Any

import pytest

from nsp.artifacts.checkpoint import read_checkpoint
from nsp.artifacts.counting import count_costs
from nsp.benchmarks.contest.contenders import Source
from nsp.benchmarks.contest.measure import Bench, BenchEvent
from nsp.benchmarks.contest.subject import Side, Subject
from nsp.benchmarks.options import BenchOptions, Effort
from nsp.benchmarks.record.result import BenchResult
from nsp.pipeline.pipeline import Pipeline, load_pipeline, torch_pipeline

SMALL = Effort(
    rounds=3,
    warmup=1,
    seconds_per_batch=60,
    engine_processes=0,
    baseline_processes=1,
    gemm_side=64,
    num_conditions=3,
    sweep_rounds=3,
    sweep_seconds=60,
)


@pytest.fixture(scope="session")
def reference(tiny_checkpoint: Path) -> Pipeline:
    return load_pipeline(tiny_checkpoint, "torch", device="cpu")


@pytest.fixture(scope="session")
def tiny_system(tiny_checkpoint: Path) -> Any:
    return read_checkpoint(tiny_checkpoint).load()


@pytest.fixture(scope="session")
def subject(tiny_checkpoint: Path, tiny_system: Any, reference: Pipeline) -> Subject:
    """The same weights in both cache layouts, in place of engines and PyTorch."""
    contender = torch_pipeline(reference.family, tiny_system, kv_layout="present", device="cpu")
    sides = [
        Side(source=Source(label=name, path=tiny_checkpoint, backend="torch"), pipeline=pipeline)
        for name, pipeline in (("engines", contender), ("torch", reference))
    ]
    return Subject(
        contender=sides[0],
        baseline=sides[1],
        weights_mib={"engines": 1.0, "torch": 2.0},
        costs=count_costs(reference.family, tiny_system),
    )


@pytest.fixture(scope="session")
def events() -> list[BenchEvent]:
    return []


@pytest.fixture(scope="session")
def result(
    subject: Subject, events: list[BenchEvent], tmp_path_factory: pytest.TempPathFactory
) -> BenchResult:
    """Everything `measure` finds, one fresh process included."""
    folder = tmp_path_factory.mktemp("bench")
    options = BenchOptions(
        engine_dir=folder, output_dir=folder, batch_sizes=(1, 2), threads=1, quick=True
    )
    return Bench(options, SMALL, 1, events.append).measure(subject)
