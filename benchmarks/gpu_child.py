"""A contestant of the GPU suite in a process of its own: `python -m nsp.benchmarks.gpu_child JOB`.

Prints the ms from the start of loading to the first pictures, and the peak of host memory; the
parent watches the memory of the GPU.
"""

import json
import sys
import time
from typing import Any

from nsp.benchmarks.contest.child import resident_mib
from nsp.errors import NspError


def main() -> None:
    """Load, generate once and a second time, and print what that took."""
    job: dict[str, Any] = json.loads(sys.argv[1])
    from nsp.benchmarks.gpu_contestants import ENTRIES, Place

    started = time.perf_counter()
    try:
        pipeline = ENTRIES[job["contestant"]].load(Place.from_dict(job["place"]))
        loaded = time.perf_counter()
        pipeline.generate(**job["request"])
        first = time.perf_counter()
        pipeline.generate(**job["request"])
        second = time.perf_counter()
    except NspError as error:
        sys.exit(str(error))
    found = {
        "load_ms": 1e3 * (loaded - started),
        "first_image_ms": 1e3 * (first - started),
        "second_ms": 1e3 * (second - first),
        "host_peak_mib": resident_mib("VmHWM"),
    }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
