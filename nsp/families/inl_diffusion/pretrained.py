"""A trained autoencoder for a new model: from a checkpoint of this family, or a published file."""

from pathlib import Path
from typing import Any

from torch import Tensor

from nsp.artifacts.checkpoint import is_checkpoint, read_checkpoint
from nsp.errors import CheckpointError
from nsp.families.inl_diffusion.config import InlConfig, VaeConfig
from nsp.families.inl_diffusion.vae import Vae
from nsp.paths import describe, wrong_path
from nsp.weights.module_weights import bounded_by_files, load_state, load_weights
from nsp.weights.state_names import find_state, shape_of
from nsp.weights.weight_files import read_tensor_file

_PART = "vae"


def read_vae_config(path: Path) -> VaeConfig:
    """Return the sizes of the autoencoder at `path`; CheckpointError if there is none.

    Of a published file the numbers of channels are read; its other sizes are the published ones.
    """
    if path.is_dir():
        return VaeConfig.from_dict(_record(path).config[_PART])
    return _config_of(_state(path), path)


def read_vae(path: Path) -> Vae:
    """Return the autoencoder at `path`: a checkpoint or run folder, `vae_final.pt`, safetensors."""
    if path.is_dir():
        record = _record(path)
        with bounded_by_files(record.folder, (_PART,)):
            made = Vae(VaeConfig.from_dict(record.config[_PART]))
        load_weights(made, record.folder / _PART)
        return made
    state = _state(path)
    made = Vae(_config_of(state, path))
    load_state(made, state, str(path))
    return made


def _record(folder: Path) -> Any:
    found = describe(folder)
    place = folder if is_checkpoint(folder) else found.model
    if place is None or not is_checkpoint(place):
        raise CheckpointError(wrong_path(folder, "--checkpoint", found))
    record = read_checkpoint(place)
    if record.config.keys() != InlConfig().to_dict().keys():
        raise CheckpointError(
            f"{folder} is a checkpoint of family {record.family.name}; --vae-path takes one of "
            "inl_diffusion, or a file of published weights (vae_final.pt)"
        )
    _ = record.digests  # its files are those that were written
    return record


def _state(path: Path) -> dict[str, Tensor]:
    return find_state(read_tensor_file(path), path)


def _config_of(state: dict[str, Tensor], path: Path) -> VaeConfig:
    first, last = "encoder.conv_in.weight", "decoder.conv_in.weight"
    if first not in state or last not in state:
        raise CheckpointError(f"{path} has no {first}: it is not an INL-VAE")
    scale = state.get("latent_scale")
    published = VaeConfig()
    return VaeConfig(
        base_channels=shape_of(state, first, 4)[0],
        latent_channels=shape_of(state, last, 4)[1],
        latent_scale=published.latent_scale if scale is None else round(float(scale), 6),
    )
