"""The program whose start-up and memory are measured: imports, loads and generates one batch.

Only what is always needed is imported at its top, because importing is part of what it measures.
"""

import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any


def answers(jobs: Iterator[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the measured fields of `ColdRun` for the one job: a `source` and a `request`."""
    from nsp.pipeline.pipeline import Pipeline  # noqa: F401

    imported_ns, job = time.monotonic_ns(), next(jobs)
    moments = {"python_ms": job["running_ns"], "imported_ms": imported_ns}
    found = generate(job, moments)
    measured = {name: 1e-6 * (at - job["started_ns"]) for name, at in moments.items()}
    yield {**measured, **found, "torch_imported": "torch" in sys.modules}


def generate(job: Mapping[str, Any], moments: dict[str, int]) -> dict[str, Any]:
    """Return times and memory of loading a contender and generating one batch with it."""
    import contextlib
    import importlib

    from nsp.backends.available import backend_record
    from nsp.benchmarks.contest.clocked import StageCall, TimedBackend, with_backend
    from nsp.benchmarks.contest.contenders import Source
    from nsp.errors import ConfigError
    from nsp.pipeline.results import to_uint8

    source = Source.from_dict(job["source"])
    # Loading would import it a moment later, but its code is not part of the model's memory.
    with contextlib.suppress(ImportError, ConfigError):  # loading says what is wrong
        importlib.import_module(backend_record(source.backend).module)
    imported_mib = resident_mib("VmRSS")
    pipeline = source.load()
    moments["loaded_ms"], loaded_mib = time.monotonic_ns(), resident_mib("VmRSS")
    first_calls: dict[str, tuple[float, float]] = {}

    def on_call(call: StageCall) -> None:
        first_calls.setdefault(call.stage, (call.ms, resident_mib("VmRSS")))

    if not pipeline.backend.records:
        pipeline = with_backend(pipeline, TimedBackend(pipeline.backend, on_call))
    steps = pipeline.stream(**job["request"])
    step = next(steps)
    moments["first_step_ms"] = time.monotonic_ns()
    for later in steps:
        step = later
    to_uint8(step.decode())
    moments["image_ms"] = time.monotonic_ns()
    return {
        "stage_ms": {stage: ms for stage, (ms, _) in first_calls.items()},
        "stage_mib": {stage: mib for stage, (_, mib) in first_calls.items()},
        "imported_mib": imported_mib,
        "loaded_mib": loaded_mib,
        "peak_mib": resident_mib("VmHWM"),
    }


def resident_mib(field: str) -> float:
    """Return resident memory of this process in MiB: VmRSS is now, VmHWM the peak.

    `resource.getrusage` would report at least the peak of the process that started this one: Linux
    keeps that number across exec. It is the fallback where there is no /proc.
    """
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            for line in status:
                name, _, value = line.partition(":")
                if name == field:
                    return int(value.split()[0]) / 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024**2 if sys.platform == "darwin" else 1024)
