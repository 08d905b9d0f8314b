"""Options of the CUDA provider for the `onnxruntime` backend, and its CUDA graphs."""

from collections.abc import Sequence
from typing import Any

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
# TF32 rounds the inputs of float32 products to 10 bits, which is too coarse to choose tokens.
_CUDA_OPTIONS = {"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}
MAX_GRAPHS = 256  # per stage; with more, its arrays have no stable addresses
NO_GRAPH = -1  # ONNX Runtime's own number for it


class CudaGraphs:
    """Numbers the graphs that the CUDA provider captures and replays.

    A graph contains the addresses of inputs and outputs, so it fits one stage with all arrays at
    the same addresses. ONNX Runtime's allocator returns the same addresses from image to image.
    """

    def __init__(self, ort: Any) -> None:
        self._new_options = ort.RunOptions
        self._numbers: dict[str, dict[Any, int]] = {}
        self._left_out: set[str] = set()

    def leave_out(self, stage: str) -> None:
        """Capture nothing of `stage`."""
        self._left_out.add(stage)

    def number(self, stage: str, arrays: Sequence[Any]) -> int:
        """Return the number of the graph with arrays at these addresses, or `NO_GRAPH`."""
        known = self._numbers.setdefault(stage, {})
        places = tuple((array.address, array.shape) for array in arrays)
        if stage in self._left_out or (places not in known and len(known) >= MAX_GRAPHS):
            return NO_GRAPH
        return known.setdefault(places, len(known) + 1)

    def run_options(self, stage: str, arrays: Sequence[Any]) -> Any:
        """Return the options with which ONNX Runtime captures or replays the graph."""
        options = self._new_options()
        options.add_run_config_entry("gpu_graph_id", str(self.number(stage, arrays)))
        return options


def with_options(providers: Sequence[str], *, graphs: bool) -> list[Any]:
    """Return the providers as ONNX Runtime takes them, with the options of the CUDA provider."""
    cuda = {**_CUDA_OPTIONS, "enable_cuda_graph": "1" if graphs else "0"}
    return [(name, cuda) if name == CUDA else name for name in providers]
