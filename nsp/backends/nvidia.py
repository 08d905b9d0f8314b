"""Finds this machine's NVIDIA GPU through its driver, without the CUDA toolkit or torch."""

import ctypes
import sys
from dataclasses import dataclass
from functools import cache

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*, cuda.h


@dataclass(frozen=True)
class Gpu:
    """The first visible GPU."""

    name: str
    compute_capability: str  # "9.0"
    driver_cuda: str  # newest CUDA version that the driver supports, "13.0"


@cache
def find_gpu() -> Gpu | None:
    """Return the first visible GPU, or None without a driver or a device."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    device, count, number = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    failed = (
        driver.cuInit(0)
        or driver.cuDeviceGetCount(ctypes.byref(count))
        or count.value == 0
        or driver.cuDeviceGet(ctypes.byref(device), 0)
        or driver.cuDeviceGetName(name, len(name), device)
        or driver.cuDriverGetVersion(ctypes.byref(number))
    )
    if failed:
        return None
    capability = []
    for attribute in (_MAJOR, _MINOR):
        value = ctypes.c_int()
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
        capability.append(str(value.value))
    cuda = number.value  # 13020 is 13.2
    return Gpu(
        name=name.value.decode(errors="replace"),
        compute_capability=".".join(capability),
        driver_cuda=f"{cuda // 1000}.{cuda % 1000 // 10}",
    )
