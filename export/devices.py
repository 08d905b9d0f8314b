"""What devices can do at most, by their makers' public datasheets; no torch.

Rates are dense: those printed "with sparsity" are halved. fp32 is without TF32.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from nsp.values import choice


@dataclass(frozen=True, kw_only=True)
class Device:
    """One device; what is not known here is None or missing."""

    name: str
    memory_gb: float | None = None  # 10^9 bytes
    bandwidth_gb_s: float | None = None
    tflop_s: Mapping[str, float] = field(default_factory=dict)  # by precision
    source: str
    target: str  # of the export that runs there


DEVICES: Mapping[str, Device] = {
    "h200": Device(
        name="NVIDIA H200 SXM",
        memory_gb=141,
        bandwidth_gb_s=4800,
        tflop_s={"fp32": 67, "fp16": 989.5, "bf16": 989.5, "int8": 1979},
        source="NVIDIA H200 Tensor Core GPU datasheet",
        target="tensorrt",
    ),
    "l4": Device(
        name="NVIDIA L4",
        memory_gb=24,
        bandwidth_gb_s=300,
        tflop_s={"fp32": 30.3, "fp16": 121, "bf16": 121, "int8": 242.5},
        source="NVIDIA L4 Tensor Core GPU datasheet",
        target="tensorrt",
    ),
    "rtx4090": Device(
        name="NVIDIA GeForce RTX 4090",
        memory_gb=24,
        bandwidth_gb_s=1008,
        # Products with float32 sums, as TensorRT makes them; with float16 sums twice as many.
        tflop_s={"fp32": 82.6, "fp16": 165.2, "bf16": 165.2, "int8": 660.6},
        source="NVIDIA Ada GPU architecture whitepaper, appendix A",
        target="tensorrt-rtx",
    ),
    "cpu": Device(
        name="CPU",
        source="not known in advance: `nsp bench` measures this machine's ceilings",
        target="onnxruntime",
    ),
}


def device(name: str) -> Device:
    """Return the device of this name; ConfigError names the nearest one."""
    return DEVICES[choice("device", name, DEVICES)]
