"""A checkpoint with an adapter (LoRA) merged into its weights."""

from pathlib import Path

from nsp.artifacts.checkpoint import is_checkpoint, read_checkpoint
from nsp.artifacts.systems import save_checkpoint
from nsp.errors import ConfigError
from nsp.weights.adapters import merge_adapter, read_adapter

_NOTE = "lora"  # in the notes of a merged checkpoint


def write_merged(checkpoint: Path, lora: Path, folder: Path) -> Path:
    """Write the model of `checkpoint` with an adapter merged in to `folder`, and return that.

    An earlier merged model is replaced. Raises CheckpointError for an adapter of another model,
    ConfigError for a folder with something else.
    """
    if is_checkpoint(folder):
        if _NOTE not in read_checkpoint(folder, verify=False).notes:
            raise ConfigError(f"{folder} is another checkpoint; give another --engine-dir")
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not a merged checkpoint; remove it first")
    record, adapter = read_checkpoint(checkpoint), read_adapter(lora)
    system = record.load()
    merge_adapter(system, adapter)
    notes = {**record.notes, _NOTE: {"digest": adapter.digest, "base": record.weights_hash()}}
    save_checkpoint(folder, system, notes=notes, sampling=record.sampling)
    return folder
