"""How the sessions of the `onnxruntime` backend share a processor's cores and memory."""

import logging
from functools import cache
from typing import Any

logger = logging.getLogger(__name__)

_ENTRIES = {
    # Workers that wait spin for 20 us, which bridges two operators (an image of w512 takes 3 %
    # less, its small scales 8 %), and not beyond the run: spinning on through the next stage's, on
    # two busy cores, an image took 6 times as long; for 1 ms within the run, 1.1 to 1.3.
    "session.intra_op.allow_spinning": "1",
    "session.intra_op.spin_duration_us": "20",
    "session.force_spinning_stop": "1",
    "session.use_env_allocators": "1",
}


def session_options(ort: Any, num_threads: int) -> Any:
    """Return the options of a stage's session."""
    _share_scratch(ort)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = num_threads
    options.inter_op_num_threads = 1  # stages are chains: nothing to run side by side
    for name, value in _ENTRIES.items():
        options.add_session_config_entry(name, value)
    # Failures are raised by the backend; ONNX Runtime would also print them.
    options.log_severity_level = 2 if logger.isEnabledFor(logging.DEBUG) else 4
    return options


@cache
def _share_scratch(ort: Any) -> None:
    """Give this process one pool of scratch in host memory, for the sessions that ask for it.

    Stages run one after the other: with a pool each, one image of w512 took 50 MiB more.
    """
    place = ort.OrtMemoryInfo(
        "Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT
    )
    ort.create_and_register_allocator(place, None)
