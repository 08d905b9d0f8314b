"""Weights as safetensors folders, and the checks made when they are read."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nsp.errors import CheckpointError
from nsp.files import name_failed_write

WEIGHTS_NAME = "model.safetensors"


def save_weights(module: nn.Module, folder: Path) -> None:
    """Write the state dict of `module` to folder/model.safetensors; OSError when that fails."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()
    }
    path = folder / WEIGHTS_NAME
    with name_failed_write(path):
        save_file(state, path)


def load_weights(module: nn.Module, folder: Path) -> None:
    """Load folder/model.safetensors into `module`, in the dtypes that `module` has."""
    load_state(module, read_safetensors(folder / WEIGHTS_NAME), str(folder))


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a safetensors file.

    Raises CheckpointError when it is missing or damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; the checkpoint is incomplete, write it again")
    try:
        state: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); write the checkpoint again") from error
    return state


def load_state(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load `state` into `module`, every name and shape matching.

    Raises CheckpointError naming the first missing, extra, misshapen or non-finite tensor and how
    many there are.
    """
    own = module.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    misshapen = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own.keys() & state.keys()
        if own[name].shape != state[name].shape
    ]
    problems = {"missing": missing, "extra": extra, "misshapen": sorted(misshapen)}
    for problem, names in problems.items():
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(f"{source}: {problem} tensor {names[0]}{more}")
    for name, tensor in state.items():
        # -inf is legitimate in a mask buffer, which is no parameter.
        if name in dict(module.named_parameters()) and not bool(
            torch.isfinite(tensor.float()).all()
        ):
            raise CheckpointError(f"{source}: tensor {name} holds NaN or infinity")
    cast = {name: tensor.to(own[name].dtype) for name, tensor in state.items()}
    module.load_state_dict(cast)
