"""Loads weights into modules after checking names, shapes and types; writes safetensors."""

import logging
import math
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from nsp.errors import CheckpointError, NspError
from nsp.weights.state_names import kind_of
from nsp.weights.weight_files import read_safetensors, read_shapes, write_safetensors

log = logging.getLogger(__name__)

WEIGHTS_NAME = "model.safetensors"
_BUILD_ERRORS = (RuntimeError, ValueError, TypeError, ArithmeticError, MemoryError, LookupError)
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def save_weights(module: nn.Module, folder: Path) -> None:
    """Write the state dict of `module` to folder/model.safetensors; OSError when that fails."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()
    }
    write_safetensors(state, folder / WEIGHTS_NAME)


def load_weights(module: nn.Module, folder: Path) -> None:
    """Load folder/model.safetensors into `module`, in the dtypes that `module` has."""
    load_state(module, read_safetensors(folder / WEIGHTS_NAME), str(folder))


@contextmanager
def bounded_by_files(
    folder: Path, parts: Sequence[str], listed: Collection[str] | None = None
) -> Iterator[None]:
    """Let modules be built that are at most as large as a checkpoint's files; see `bounded`.

    Only the files' headers are read. With `listed` each file must be among those names.
    """
    shapes: list[tuple[int, ...]] = []
    for part in parts:
        path = folder / part / WEIGHTS_NAME
        if listed is not None and f"{part}/{WEIGHTS_NAME}" not in listed:
            raise CheckpointError(
                f"{path} is not listed in config.json; the checkpoint is incomplete, write it again"
            )
        shapes += read_shapes(path).values()
    with bounded(shapes, str(folder)):
        yield


@contextmanager
def bounded(shapes: Iterable[Sequence[int]], source: str) -> Iterator[None]:
    """Let modules be built that are not much larger than the tensors to load into them.

    A configuration with absurd numbers ends in CheckpointError: parameters are counted when they
    are registered, before memory is used to fill them. Torch's errors about impossible sizes become
    one line. Modules of other threads are not counted.
    """
    sizes = [math.prod(shape) for shape in shapes]
    # Allow a model with a few more layers: loading then names the layers that do not fit.
    most, largest = 4 * len(sizes) + 64, 4 * sum(sizes) + 2**16
    thread, count, total = threading.get_ident(), 0, 0

    def note(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> None:
        nonlocal count, total
        if threading.get_ident() != thread or parameter is None:
            return
        count, total = count + 1, total + parameter.numel()
        if count > most or total > largest:
            raise CheckpointError(
                f"{source}: the configuration describes a model of more than {count} tensors and "
                f"{total:,} numbers, but the file has {len(sizes)} and {sum(sizes):,}; they do not "
                "belong together, copy both again"
            )

    handle = register_module_parameter_registration_hook(note)
    try:
        yield
    except NspError:
        raise
    except _BUILD_ERRORS as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{source}: the configuration describes a model that cannot be built ({reason})"
        ) from error
    finally:
        handle.remove()


def compare_shapes(
    own: Mapping[str, Tensor],
    found: Mapping[str, tuple[int, ...]],
    source: str,
    *,
    optional: Collection[str] = (),
) -> None:
    """Raise CheckpointError naming the first missing, extra or misshapen tensor, and their number.

    Names in `optional` may be missing, and may occur although `own` does not have them.
    """
    missing = sorted(own.keys() - found.keys() - set(optional))
    extra = sorted(found.keys() - own.keys() - set(optional))
    misshapen = [
        f"{name} {tuple(found[name])} instead of {tuple(own[name].shape)}"
        for name in own.keys() & found.keys()
        if tuple(own[name].shape) != tuple(found[name])
    ]
    problems = {"missing": missing, "extra": extra, "misshapen": sorted(misshapen)}
    for problem, names in problems.items():
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            kind, wanted = kind_of(found), kind_of(own)
            holds = f"; it contains {kind}" if kind is not None and kind != wanted else ""
            raise CheckpointError(f"{source}: {problem} tensor {names[0]}{more}{holds}")


def joined(state: Mapping[str, Tensor], names: Sequence[str], source: str) -> Tensor:
    """Return tensors as one, along the first axis.

    Raises CheckpointError naming one that is missing, has another shape or type, or no axis.
    """
    first = None
    for name in names:
        if name not in state:
            raise CheckpointError(f"{source}: missing tensor {name}")
        found = (tuple(state[name].shape), str(state[name].dtype).removeprefix("torch."))
        first = found if first is None else first
        if found != first or not found[0]:
            raise CheckpointError(
                f"{source}: tensor {name} is {found[1]} {found[0]}, but {names[0]} is {first[1]} "
                f"{first[0]}; they are parts of one"
            )
    return torch.cat([state[name] for name in names])


def computed_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of `module` that are computed from its configuration.

    Buffers that were measured instead are named in the module's `MEASURED_BUFFERS`.
    """
    return {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, part in module.named_modules()
        for name, buffer in part.named_buffers(recurse=False)
        if name not in getattr(part, "MEASURED_BUFFERS", ())
    }


def load_state(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load `state` into `module`, every name, shape and type matching.

    Buffers that follow from the configuration may be missing; if present, they must have the values
    that the module computes. (Buffers named in the module's `RECOMPUTED_BUFFERS` are replaced by
    the computed values, with a warning.) Raises CheckpointError naming the first missing, extra,
    misshapen, mistyped or non-finite tensor and how many there are.
    """
    own, computed = module.state_dict(), computed_buffers(module)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    compare_shapes(own, shapes, source, optional=computed)
    check_types(own, state, source)
    if eight := rounded_to_eight_bits(state):
        log.warning("%s: %s have 8-bit weights, which were rounded before", source, eight)
    # -inf is legitimate in a mask buffer, which is not a parameter.
    check_finite(dict(module.named_parameters()), state, source)
    odd = [name for name in computed.keys() & state.keys() if not _is_computed(name, module, state)]
    for name in sorted(odd):
        where = f"{source}: tensor {name} differs from what the configuration gives"
        part, _, last = name.rpartition(".")
        if last not in getattr(module.get_submodule(part), "RECOMPUTED_BUFFERS", ()):
            raise CheckpointError(f"{where}; it belongs to another model or is damaged")
        log.warning("%s: the computed one is used instead of the file's", where)
    state = {name: tensor for name, tensor in state.items() if name not in odd}
    cast = {name: tensor.to(own[name].dtype) for name, tensor in state.items() if name in own}
    module.load_state_dict({**own, **cast})


def check_finite(names: Collection[str], state: Mapping[str, Tensor], source: str) -> None:
    """Raise CheckpointError naming the first of `names` whose tensor has NaN or infinity."""
    for name, tensor in state.items():
        if name in names and not bool(torch.isfinite(tensor.float()).all()):
            raise CheckpointError(f"{source}: tensor {name} contains NaN or infinity")


def check_types(own: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str) -> None:
    """Raise CheckpointError for integers where the model has floating-point numbers."""
    wanted = {n: t for n, t in state.items() if n in own and own[n].is_floating_point()}
    wrong = [n for n, t in wanted.items() if t.dtype not in _FLOATS and not _is_eight_bits(t.dtype)]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        dtype = str(state[wrong[0]].dtype).removeprefix("torch.")
        is_integer = not (state[wrong[0]].is_complex() or state[wrong[0]].dtype == torch.bool)
        remedy = (
            "these are quantized without their scales, give the original weights"
            if is_integer
            else "they belong to another model or are damaged"
        )
        raise CheckpointError(
            f"{source}: tensor {wrong[0]}{more} has {dtype}, but the model has floating-point "
            f"weights; {remedy}"
        )


def _is_eight_bits(dtype: torch.dtype) -> bool:
    return "float8_e4m3" in str(dtype) or "float8_e5m2" in str(dtype)


def rounded_to_eight_bits(state: Mapping[str, Tensor]) -> str | None:
    """Return the number of 8-bit tensors and their types in words; None if there are none."""
    found = [str(t.dtype).removeprefix("torch.") for t in state.values() if _is_eight_bits(t.dtype)]
    if not found:
        return None
    return f"{len(found)} of {len(state)} tensors ({', '.join(sorted(set(found)))})"


def _is_computed(name: str, module: nn.Module, state: Mapping[str, Tensor]) -> bool:
    """Return whether a buffer in `state` equals the computed one, up to its type's precision."""
    computed, given = module.get_buffer(name), state[name]
    return computed.shape == given.shape and torch.equal(computed.to(given.dtype), given)
