"""The outputs of a frozen part of the model for all pictures: computed once, kept in a file."""

import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor, nn

from nsp.data.dataset import ImageDataset
from nsp.errors import CheckpointError, ConfigError, DataError
from nsp.family.objective import TokenCache
from nsp.files import write_file
from nsp.sniff import sniff
from nsp.weights.weight_files import read_metadata, read_safetensors, write_safetensors

logger = logging.getLogger(__name__)


def is_constant(data: ImageDataset) -> bool:
    """Return whether every epoch shows the same pictures."""
    return not (data.train and (data.crop or data.flip))


def cached(
    cache: TokenCache | None,
    key: Callable[[], str],
    make: Callable[[], Mapping[str, Tensor]],
    *,
    maker: str,
) -> Mapping[str, Tensor]:
    """Return the result of `make`, from the cache if that was made with the same `key`.

    `maker` names the part of the model. Raises ConfigError when a cache given by the user is
    missing or was made by another model or from other pictures, DataError for a damaged one.
    """
    if cache is None:
        return make()
    exists = cache.file.exists()
    if exists and _key_of(cache.file) == key():
        return read_safetensors(cache.file)
    if cache.is_given:
        problem = f"was made with another {maker} or other pictures" if exists else "does not exist"
        raise ConfigError(
            f"{cache.file} {problem}; make it with nsp data cache, or do not set data.token_cache"
        )
    if exists:
        logger.warning(
            "%s was made with another %s or other pictures; making it again", cache.file, maker
        )
    return write_cache(cache.file, key(), make)


def write_cache(
    file: Path, key: str, make: Callable[[], Mapping[str, Tensor]]
) -> Mapping[str, Tensor]:
    """Write the result of `make` to a safetensors file, and return it."""
    started = time.monotonic()
    tensors = make()
    with write_file(file) as partial:
        write_safetensors(tensors, partial, metadata={"key": key})
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
    logger.info("%s: %s, %.0f s", file, shapes, time.monotonic() - started)
    return tensors


def _key_of(file: Path) -> str | None:
    """Return the key that a cache was made with; DataError when it is damaged."""
    try:
        return read_metadata(file).get("key")
    except CheckpointError as error:
        words = sniff(file).words
        raise DataError(f"{file} {words} and is damaged; delete it to make it again") from error


def digest_of(
    about: object, module: nn.Module, data: ImageDataset, *, decides: Callable[[str], bool]
) -> str:
    """Return the SHA-256 of the settings, the weights named here, and the pictures' bytes."""
    digest = digest_of_weights(about, module, decides=decides)
    for index in range(len(data)):
        digest.update(data.source.files[index].read())
    return digest.hexdigest()


def digest_of_weights(
    about: object, module: nn.Module, *, decides: Callable[[str], bool]
) -> "hashlib._Hash":
    """Return a SHA-256 that has the settings and the weights named here."""
    digest = hashlib.sha256(repr(about).encode())
    for name, tensor in sorted(module.state_dict().items()):
        if decides(name):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest
