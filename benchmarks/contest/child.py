"""The program whose start-up and memory are measured: `python -m nsp.benchmarks.contest.child JOB`.

It prints one JSON object, the measured fields of `ColdRun`. JOB is JSON too: `started_ns`, the
parent's monotonic clock just before this process was created; `path`, `backend` and `options` for
`load_pipeline`; `request` for `Pipeline.stream`. Only what is always needed is imported before the
clock is first read.
"""

import json
import sys
import time
from typing import Any


def main() -> None:
    """Measure, and print what was found; exit with the message of an expected error."""
    running_ns = time.monotonic_ns()
    job = json.loads(sys.argv[1])

    from nsp.errors import NspError
    from nsp.pipeline.pipeline import Pipeline  # noqa: F401

    imported_ns = time.monotonic_ns()
    try:
        found = generate(job)
    except NspError as error:
        sys.exit(str(error))
    moments = {"python_ms": running_ns, "imported_ms": imported_ns, **found.pop("moments")}
    measured = {name: 1e-6 * (at - job["started_ns"]) for name, at in moments.items()}
    json.dump({**measured, **found, "torch_imported": "torch" in sys.modules}, sys.stdout)


def generate(job: dict[str, Any]) -> dict[str, Any]:
    """Return times and memory of loading a pipeline and generating one batch with it."""
    import contextlib
    import importlib

    from nsp.backends.available import backend_record
    from nsp.benchmarks.contest.rounds import StageCall, TimedBackend, with_backend
    from nsp.errors import ConfigError
    from nsp.pipeline.pipeline import load_pipeline
    from nsp.pipeline.results import to_uint8

    # Loading would import it a moment later, but its code is not part of the model's memory.
    with contextlib.suppress(ImportError, ConfigError):  # `load_pipeline` says what is wrong
        importlib.import_module(backend_record(job["backend"]).module)
    imported_mib = resident_mib("VmRSS")
    pipeline = load_pipeline(job["path"], job["backend"], **job["options"])
    loaded_ns, loaded_mib = time.monotonic_ns(), resident_mib("VmRSS")
    first_calls: dict[str, tuple[float, float]] = {}

    def on_call(call: StageCall) -> None:
        first_calls.setdefault(call.stage, (call.ms, resident_mib("VmRSS")))

    pipeline = with_backend(pipeline, TimedBackend(pipeline.backend, on_call))
    steps = pipeline.stream(**job["request"])
    step = next(steps)
    first_step_ns = time.monotonic_ns()
    for later in steps:
        step = later
    to_uint8(step.decode())
    return {
        "moments": {
            "loaded_ms": loaded_ns,
            "first_step_ms": first_step_ns,
            "image_ms": time.monotonic_ns(),
        },
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


if __name__ == "__main__":
    main()
