"""Codes of pictures as training data, and their extraction into a folder of files."""

import dataclasses
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from nsp.data.codes import ABOUT_NAME, CLOSER, CODES, LABELS, CodeDataset
from nsp.data.dataset import to_model_range
from nsp.data.identity import digest_of
from nsp.data.sources import ImageSource
from nsp.data.ten_crop import Extraction, crops_of
from nsp.errors import ConfigError, DataError
from nsp.files import read_json, write_file
from nsp.training.tokens import Tokenizing, check_classes

logger = logging.getLogger(__name__)
_REPORT_S = 30.0


class CodeTokens(Dataset[Mapping[str, object]]):
    """Classes with the codes of a crop, a new one in every epoch."""

    def __init__(
        self,
        data: CodeDataset,
        tokenizing: Tokenizing,
        *,
        num_classes: int,
        length: int,
        num_codes: int,
    ) -> None:
        """Check that the codes are this model's; ConfigError for another tokenizer or size."""
        self._data, self._num_codes = data, num_codes
        classes = [sample.class_id or 0 for sample in data.source.samples]
        self._classes = torch.tensor(classes)
        check_classes(self._classes, num_classes)
        place = data.source.folder
        for each in (place, place.with_name(place.name + CLOSER)):
            about = dataclasses.replace(data.source, folder=each).about()
            if about and about.get("tokenizer") != tokenizing.digest():
                raise ConfigError(
                    f"{each} has codes of another tokenizer (codes.json); extract them again with "
                    "this model's, nsp data cache --checkpoint"
                )
        self._length = length
        self[0]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose crops come next."""
        self._data.set_epoch(epoch)

    def __len__(self) -> int:
        """Return the number of pictures."""
        return len(self._data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `condition` and `tokens` (N,)."""
        codes, file = self._data.drawn_codes(index)
        if len(codes) != self._length:
            picture = self._data.source.samples[index].name
            raise ConfigError(
                f"{file} has {len(codes)} codes for picture {picture}, but the model's pictures "
                f"have {self._length}; extract codes at the size of the training (--image-size)"
            )
        if codes.min() < 0 or codes.max() >= self._num_codes:
            raise DataError(
                f"{file} has codes from {codes.min()} to {codes.max()}, but the tokenizer has "
                f"{self._num_codes}; they are of another one"
            )
        return {"condition": self._classes[index], "tokens": torch.from_numpy(codes)}


@torch.no_grad()
def write_codes(
    tokenizing: Tokenizing, source: ImageSource, folder: Path, settings: Extraction
) -> int:
    """Write the codes and labels of this process's pictures; return how many were missing.

    Every picture is a file of its own, and complete ones stay: a run that was stopped is continued
    by running it again. Raises ConfigError for a folder made with other settings, and pictures
    without a class.
    """
    name, device = f"imagenet{settings.image_size_px}", next(tokenizing.module.parameters()).device
    if without := [each.name for each in source.samples if each.class_id is None]:
        raise ConfigError(
            f"{without[0]} has no class; codes are kept with classes, so put the pictures into "
            "class folders"
        )
    sets, made, reported = settings.sets(folder), 0, time.monotonic()
    for place, crop_range in sets.items():
        _settle_about(place, source, tokenizing, settings, crop_range)
    mine = range(settings.part, len(source), settings.num_parts)
    for index in mine:
        label = source.samples[index].class_id
        missing = {
            place: crop_range
            for place, crop_range in sets.items()
            if not (place / f"{name}{LABELS}" / f"{index}.npy").exists()
        }
        picture = source.load(index) if missing else None
        for place, crop_range in missing.items():
            assert picture is not None
            crops = crops_of(
                picture,
                settings.image_size_px,
                crop_range=crop_range,
                ten_crop=settings.ten_crop,
                flip=settings.flip,
            )
            image = to_model_range(torch.from_numpy(crops.copy()).to(device))
            codes = tokenizing.tokens(image).cpu().numpy()[None]
            _write_npy(place / f"{name}{CODES}" / f"{index}.npy", codes)
            # The label comes last: a picture with a label is complete.
            _write_npy(place / f"{name}{LABELS}" / f"{index}.npy", np.array([label]))
        made += bool(missing)
        if time.monotonic() - reported > _REPORT_S:
            logger.info("%d of %d pictures", index // settings.num_parts + 1, len(mine))
            reported = time.monotonic()
    return made


def _settle_about(
    place: Path,
    source: ImageSource,
    tokenizing: Tokenizing,
    settings: Extraction,
    crop_range: float,
) -> None:
    """Write codes.json, or check that an earlier process wrote the same one."""
    about = {
        "tokenizer": tokenizing.digest(),
        "image_size_px": settings.image_size_px,
        "ten_crop": settings.ten_crop,
        "flip": settings.flip or settings.ten_crop,
        "crop_range": crop_range,
        "pictures": _digest_of_names(source),
    }
    file = place / ABOUT_NAME
    if file.exists():
        if read_json(file) != about:
            raise ConfigError(
                f"{place} has codes of another tokenizer, of other crops or of other pictures; "
                "choose another --output"
            )
        return
    # What a process beside this one, or a killed one, is writing is no content.
    if place.exists() and any(not each.name.endswith(".partial") for each in place.iterdir()):
        raise ConfigError(f"{place} is not empty, and has no codes of nsp; choose another --output")
    with write_file(file) as partial:
        partial.write_text(json.dumps(about, indent=1) + "\n")


def _digest_of_names(source: ImageSource) -> str:
    """Return what changes with the pictures' order, names or classes: files are numbered by it."""
    listed = [[each.name, each.class_id] for each in source.samples]
    return digest_of(json.dumps(listed).encode()).hex()


def _write_npy(path: Path, array: NDArray[np.generic]) -> None:
    with write_file(path) as partial, partial.open("wb") as file:
        np.save(file, array)
