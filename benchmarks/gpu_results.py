"""What the GPU suite found, as records: the content of gpu_suite.json, and its Markdown."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nsp.benchmarks.ceilings.cpu import Environment
from nsp.benchmarks.ceilings.gpu import KERNELS_PER_LAYER, GpuCeilings
from nsp.benchmarks.record.result import Cost
from nsp.config import Config

GPU_SCHEMA = 1
IMAGE, LOOP, DECODER = "image", "loop", "decoder"
PARTS = (IMAGE, LOOP, DECODER)


@dataclass(frozen=True, kw_only=True)
class GpuObservation(Config):
    """One round of one contestant, in ms by the suite's clock."""

    contestant: str
    round: int  # below 0: warm-up
    place: int  # in the round
    image: float  # `generate`: from prompts or classes to uint8 pictures on the host
    loop: float  # the scale steps alone, their tokens read as they come
    decoder: float  # the decoder alone, on a latent from the host


@dataclass(frozen=True, kw_only=True)
class FreshProcess(Config):
    """A contestant loaded in a process of its own."""

    load_ms: float
    first_image_ms: float  # loading included, imports not
    second_ms: float
    host_peak_mib: float
    gpu_peak_mib: float | None  # of the whole process, its CUDA context included


@dataclass(frozen=True, kw_only=True)
class PartCost(Config):
    """What one part of generating has to do, whoever does it."""

    gflop: float
    mib: float
    roof_ms: float  # sum over its calls of the longer of bytes / bandwidth and operations / rate
    launch_ms: float  # cheapest launches of its kernels, an estimate


@dataclass(frozen=True, kw_only=True)
class GpuRow(Config):
    """One part of one contestant."""

    contestant: str
    part: str
    p50_ms: float
    p95_ms: float
    count: int
    tflop_s: float
    gb_s: float
    of_roof: float  # 1: at the ceiling
    times_floor: float  # p50 over roof and launches together
    speedup: float | None  # of eager PyTorch's median over this one


@dataclass(frozen=True, kw_only=True)
class Agreement(Config):
    """How closely a contestant computes what float32 PyTorch computes."""

    token_agreement: float  # teacher-forced
    max_relative_error: float
    psnr_db: float | None  # None: bit for bit equal


@dataclass(frozen=True, kw_only=True)
class Contest(Config):
    """One model size at one batch size."""

    size: str
    batch: int
    parameters: int
    costs: dict[str, PartCost]
    rows: tuple[GpuRow, ...]
    parity: dict[str, Agreement]
    fresh: dict[str, FreshProcess]
    build_s: dict[str, float]  # of the engines
    missing: dict[str, str]  # contestant -> why
    observations: tuple[GpuObservation, ...]


@dataclass(frozen=True, kw_only=True)
class SuiteResult(Config):
    """The content of gpu_suite.json."""

    schema_version: int
    created: str  # UTC, ISO 8601
    seconds: float
    options: dict[str, Any]
    clock: str
    environment: Environment
    ceilings: GpuCeilings
    contests: tuple[Contest, ...]


def part_cost(costs: Sequence[Cost], ceilings: GpuCeilings, launch_ms: float) -> PartCost:
    """Return the work of several calls and the least time it takes, call by call."""
    return PartCost(
        gflop=sum(cost.gflop for cost in costs),
        mib=sum(cost.mib for cost in costs),
        roof_ms=sum(max(c.roof_ms(ceilings), c.memory_ms(ceilings)) for c in costs),
        launch_ms=launch_ms,
    )


def summary_rows(
    observations: Sequence[GpuObservation], costs: dict[str, PartCost], baseline: str
) -> tuple[GpuRow, ...]:
    """Return a row per contestant and part, in order; warm-up rounds are only kept."""
    measured = [each for each in observations if each.round >= 0]
    names = dict.fromkeys(each.contestant for each in observations)
    times = {
        (name, part): [getattr(o, part) for o in measured if o.contestant == name]
        for part in PARTS
        for name in names
    }
    return tuple(
        _row(name, part, values, costs[part], times.get((baseline, part)))
        for (name, part), values in times.items()
    )


def _row(
    name: str, part: str, values: list[float], cost: PartCost, baseline: list[float] | None
) -> GpuRow:
    p50, p95 = (float(p) for p in np.percentile(values, (50, 95)))
    return GpuRow(
        contestant=name,
        part=part,
        p50_ms=p50,
        p95_ms=p95,
        count=len(values),
        tflop_s=cost.gflop / p50,
        gb_s=1e-6 * cost.mib * 2**20 / p50,
        of_roof=cost.roof_ms / p50,
        times_floor=p50 / (cost.roof_ms + cost.launch_ms),
        speedup=float(np.median(baseline)) / p50 if baseline else None,
    )


def markdown(result: SuiteResult) -> str:
    """Return the result as GitHub-flavoured Markdown."""
    lines = ["# nsp GPU suite", "", *_head(result)]
    for contest in result.contests:
        lines += ["", f"## {contest.size}, batch {contest.batch}", *_contest(contest)]
    return "\n".join(lines) + "\n"


def _head(result: SuiteResult) -> Iterator[str]:
    ceilings, packages = result.ceilings, result.environment.packages
    versions = ", ".join(f"{name} {version}" for name, version in packages.items())
    graph = ceilings.graph_kernel_us
    in_graph = "" if graph is None else f", {graph:.2f} us in a CUDA graph"
    yield (
        f"{ceilings.device}, {ceilings.dtype}; {result.environment.system}; {versions}. "
        f"{result.created}, {result.seconds:.0f} s."
    )
    yield ""
    yield (
        f"Measured ceilings: {1e-3 * ceilings.gemm_peak_gflops:.1f} TFLOP/s in products of "
        f"{ceilings.gemm_side} squared, {ceilings.bandwidth_gb_s:.0f} GB/s in copies of "
        f"{ceilings.copy_mib} MiB, {ceilings.launch_us:.2f} us a launch{in_graph}. Roof: for every "
        "stage call the longer of its bytes at that bandwidth (weights, inputs and outputs once) "
        "and its operations at that rate. Floor: roof plus the launches of "
        f"{KERNELS_PER_LAYER} kernels a block and scale, an estimate. Random weights, guidance on; "
        f"clock: {result.clock}; interleaved rounds, warm-up apart."
    )


def _contest(contest: Contest) -> Iterator[str]:
    cost = contest.costs[IMAGE]
    yield ""
    yield (
        f"{1e-6 * contest.parameters:.0f} M parameters; {1e-3 * cost.gflop:.3g} TFLOP and "
        f"{cost.mib / 1024:.3g} GiB a batch; roof {cost.roof_ms:.3g} ms, of which the decoder "
        f"{contest.costs[DECODER].roof_ms:.3g}."
    )
    header = ("part", "contestant", "p50 ms", "p95 ms", "TFLOP/s", "GB/s", "of roof", "x floor")
    yield from _table(
        (*header, "x eager"),
        [
            (
                row.part,
                row.contestant,
                f"{row.p50_ms:.2f}",
                f"{row.p95_ms:.2f}",
                f"{row.tflop_s:.2f}",
                f"{row.gb_s:.0f}",
                f"{100 * row.of_roof:.1f} %",
                f"{row.times_floor:.2f}",
                "-" if row.speedup is None else f"{row.speedup:.2f}",
            )
            for row in contest.rows
        ],
    )
    yield from _table(
        ("contestant", "tokens", "logit error", "PSNR dB", "build s", "first image s", "GPU MiB"),
        [_ready(contest, name) for name in dict.fromkeys(row.contestant for row in contest.rows)],
    )
    for name, reason in contest.missing.items():
        yield ""
        yield f"Missing: {name}: {reason}"


def _ready(contest: Contest, name: str) -> tuple[str, ...]:
    parity, fresh = contest.parity[name], contest.fresh.get(name)
    psnr = "equal" if parity.psnr_db is None else f"{parity.psnr_db:.1f}"
    build = contest.build_s.get(name)
    gpu = None if fresh is None else fresh.gpu_peak_mib
    return (
        name,
        f"{100 * parity.token_agreement:.2f} %",
        f"{parity.max_relative_error:.1e}",
        psnr,
        "-" if build is None else f"{build:.0f}",
        "-" if fresh is None else f"{1e-3 * fresh.first_image_ms:.2f}",
        "-" if gpu is None else f"{gpu:.0f}",
    )


def _table(header: Sequence[str], cells: Sequence[Sequence[str]]) -> Iterator[str]:
    yield ""
    yield "| " + " | ".join(header) + " |"
    yield "| --- |" + " ---: |" * (len(header) - 1)
    for row in cells:
        yield "| " + " | ".join(row) + " |"
