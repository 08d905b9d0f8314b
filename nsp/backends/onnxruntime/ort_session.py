"""How the sessions of the `onnxruntime` backend share a processor's cores and memory."""

import logging
from functools import cache
from typing import Any

logger = logging.getLogger(__name__)

_ENTRIES = {
    # Waiting workers spin for 20 us, the time between two operators (an image of w512 then takes
    # 3 % less, its small scales 8 %), but not after the run. Spinning during the next stage's run
    # made an image take 6 times as long on two busy cores; 1 ms within the run, 1.1 to 1.3 times.
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
    options.inter_op_num_threads = 1  # stages are chains without parallel operators
    for name, value in _ENTRIES.items():
        options.add_session_config_entry(name, value)
    # Failures are raised by the backend; ONNX Runtime would also print them.
    options.log_severity_level = 2 if logger.isEnabledFor(logging.DEBUG) else 4
    return options


@cache
def _share_scratch(ort: Any) -> None:
    """Create one pool of scratch memory on the host for all sessions of this process.

    Stages run one after the other; with separate pools, one image of w512 took 50 MiB more.
    """
    place = ort.OrtMemoryInfo(
        "Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT
    )
    ort.create_and_register_allocator(place, None)
