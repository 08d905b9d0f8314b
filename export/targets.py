"""Export targets: one record each, and the meaning of "auto" on this machine."""

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nsp.backends.available import BACKENDS, BackendRecord
from nsp.backends.nvidia import find_gpu
from nsp.errors import BackendError, ConfigError
from nsp.export.options import AUTO, ExportOptions

logger = logging.getLogger(__name__)

_CPU = ("fp32", "int8")  # the precisions that are for CPUs


@dataclass(frozen=True, kw_only=True)
class Target:
    """One kind of engine."""

    name: str  # on the command line
    backend: str  # in the manifest
    kv_layouts: tuple[str, ...]  # of the cache, best first; a family need not have all
    # The layouts to prefer at precisions that are for CPUs.
    cpu_kv_layouts: tuple[str, ...] = ()
    opset: int
    precisions: tuple[str, ...]
    compiles: bool  # whether it compiles engines; otherwise the ONNX file is the engine
    gpu_archs: tuple[str, ...] = ()  # buildable on any machine; () means only this machine's GPU
    default_gpu_archs: tuple[str, ...] = ()
    times_kernels: bool = False  # its builder tries kernels, and a timing cache saves time

    @property
    def runtime(self) -> BackendRecord:
        """The backend that runs the engines, with the package that makes them."""
        return BACKENDS[self.backend]

    def layouts(self, precision: str) -> tuple[str, ...]:
        """Return the layouts of the cache, best first."""
        return (*(self.cpu_kv_layouts if precision in _CPU else ()), *self.kv_layouts)


TARGETS: Mapping[str, Target] = {
    # Attention with past and present inside the operator is fastest on ONNX Runtime's CPU, which
    # does not have it in bfloat16. Where a token is a step, it may not copy the past either: the
    # operator for that is complete on the CPU alone.
    "onnxruntime": Target(
        name="onnxruntime",
        backend="onnxruntime",
        kv_layouts=("present", "delta"),
        cpu_kv_layouts=("in_place",),
        opset=23,
        precisions=("fp32", "fp16", "int8"),
        compiles=False,
    ),
    # TensorRT's parsers refuse that operator, so attention is matrix products (opset 18) and the
    # cache is an argument. With many short steps it is padded: every size needs a profile.
    "tensorrt-rtx": Target(
        name="tensorrt-rtx",
        backend="tensorrt_rtx",
        kv_layouts=("fixed", "delta"),
        opset=18,
        precisions=("fp32", "fp16", "bf16"),
        compiles=True,
        gpu_archs=("75", "80", "86", "89", "120", "121", "current"),
        default_gpu_archs=("80", "86", "89", "120"),
    ),
    "tensorrt": Target(
        name="tensorrt",
        backend="tensorrt",
        kv_layouts=("fixed", "delta"),
        opset=18,
        precisions=("fp32", "fp16", "bf16"),
        compiles=True,
        times_kernels=True,
    ),
}


def is_installed(target: Target) -> bool:
    """Return whether the target's module can be found; it is not imported."""
    return importlib.util.find_spec(target.runtime.module) is not None


def resolve(options: ExportOptions) -> list[tuple[Target, str]]:
    """Return the (target, precision) pairs to export, in order.

    "auto" is what this machine can run: ONNX Runtime and, with an NVIDIA GPU, every installed
    TensorRT; if ONNX Runtime would run on a CPU it adds fp32, which is fast on a CPU. Named targets
    may stand beside it. Raises ConfigError for an unknown target, a precision that a
    target does not have, a GPU architecture that cannot be built for or an option that no target
    uses, and BackendError for a target that is not installed.
    """
    named = [_named(name) for name in dict.fromkeys(options.targets) if name != AUTO]
    pairs = [(target, precision) for target in named for precision in options.precisions]
    if AUTO in options.targets:
        pairs = [*_automatic(options, named), *pairs]
    for target, precision in pairs:
        if precision not in target.precisions:
            raise ConfigError(
                f"target {target.name} has only {', '.join(target.precisions)}, not {precision}; "
                "export it with --fp32 or --fp16, or choose a TensorRT target"
            )
        if not is_installed(target):
            raise BackendError(
                f"target {target.name}: {target.runtime.module} is not installed; {_advice(target)}"
            )
        gpu_archs(target, options)
    _check_heeded([target for target, _ in pairs], options)
    return list(dict.fromkeys(pairs))


def gpu_archs(target: Target, options: ExportOptions) -> tuple[str, ...]:
    """Return the GPU architectures to build a target for; () is the GPU of this machine."""
    if not target.gpu_archs:
        return ()
    wanted = options.gpu_archs or target.default_gpu_archs
    if unknown := [arch for arch in wanted if arch not in target.gpu_archs]:
        raise ConfigError(
            f"target {target.name} cannot build for GPU architecture {unknown[0]!r}; "
            f"known: {', '.join(target.gpu_archs)}"
        )
    return wanted


def _check_heeded(targets: Sequence[Target], options: ExportOptions) -> None:
    """Raise ConfigError for an option without effect on any of the targets."""
    heeded = {
        "--gpu-arch": (options.gpu_archs, [t for t in targets if t.gpu_archs], "tensorrt-rtx"),
        "--static-batch": (options.static_batch, [t for t in targets if t.compiles], "TensorRT"),
    }
    for option, (given, heeders, kind) in heeded.items():
        if given and not heeders:
            names = ", ".join(dict.fromkeys(target.name for target in targets))
            raise ConfigError(f"{option} is only for {kind} engines, but the targets are: {names}")


def _advice(target: Target) -> str:
    """Return what to do about a target that is not installed."""
    if is_installed(target):
        return f"--target {target.name} builds it for machines with an NVIDIA GPU"
    if (install := target.runtime.install) is not None:
        return f"run: {install}"
    return (
        f"{target.name} engines run on an NVIDIA GPU, which this machine does not have; export "
        "on a machine with one"
    )


def _named(name: str) -> Target:
    if name not in TARGETS:
        raise ConfigError(f"unknown target {name!r}; known: {AUTO}, {', '.join(TARGETS)}")
    return TARGETS[name]


def _automatic(options: ExportOptions, named: Sequence[Target]) -> list[tuple[Target, str]]:
    """Return the targets that suit this machine, and log why; `named` ones are built besides."""
    runtime = TARGETS["onnxruntime"]
    precisions = [p for p in options.precisions if p in runtime.precisions]
    asked_narrow = set(_CPU).isdisjoint(precisions)
    if asked_narrow and not (precisions and _onnxruntime_has_gpu()):
        precisions.insert(0, "fp32")
        logger.info("target auto: also fp32, which is fastest in ONNX Runtime on a CPU")
    pairs = [(runtime, precision) for precision in precisions]
    for target in (TARGETS["tensorrt-rtx"], TARGETS["tensorrt"]):
        if target in named:
            continue
        if not is_installed(target):
            logger.info("target auto: no %s, because it is not installed", target.name)
        elif find_gpu() is not None or (target.gpu_archs and options.gpu_archs):
            pairs += [(target, p) for p in options.precisions if p in target.precisions]
        elif target.gpu_archs:
            logger.info(
                "target auto: no %s, because this machine has no NVIDIA GPU; to build its engines "
                "here for others, add: --target auto --target %s",
                *(target.name, target.name),
            )
    found = {precision for _, precision in pairs}
    found |= {precision for target in named for precision in target.precisions}
    if missing := set(options.precisions) - found:
        raise ConfigError(
            f"no target that runs here has {min(missing)}; {_advice(TARGETS['tensorrt-rtx'])}, "
            "or export with --fp32 or --fp16"
        )
    return pairs


def _onnxruntime_has_gpu() -> bool:
    """Return whether the installed ONNX Runtime has a CUDA provider."""
    try:
        import onnxruntime
    except ImportError:
        return False
    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()
