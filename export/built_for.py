"""The machine that a compiled engine needs; part of its fingerprint and of the manifest."""

import platform
from collections.abc import Sequence

from nsp.backends.nvidia import find_gpu


def built_for(gpu_archs: Sequence[str]) -> dict[str, str]:
    """Return operating system, processor type and GPU of an engine for `gpu_archs`.

    Without any, or with "current", it is this machine's GPU, or missing if there is none.
    The runtime refuses an engine on another machine (nsp/artifacts/engine_choice.py).
    """
    target = {"os": platform.system().lower(), "machine": platform.machine()}
    if gpu_archs and "current" not in gpu_archs:
        capabilities = [f"{arch[:-1]}.{arch[-1]}" for arch in gpu_archs]
        return {**target, "compute_capability": " ".join(capabilities)}
    gpu = find_gpu()
    return target if gpu is None else {**target, "compute_capability": gpu.compute_capability}
