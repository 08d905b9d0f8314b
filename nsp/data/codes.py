"""Folders of codes: pictures that are known by what an image tokenizer made of them.

    FOLDER/NAME_codes/0.npy    (1, crops, N) codes of picture 0: 10 with ten crops, 2 if mirrored
    FOLDER/NAME_labels/0.npy   (1,) its class
    FOLDER/NAME_labels.npz     all classes, kept by the first run for later ones
    FOLDER/codes.json          how they were made; folders of other programs lack it
    FOLDER_105/...             the same pictures in closer crops: half of the draws are from here

This is the layout of github.com/FoundationVision/LlamaGen. A training draws one crop per picture
and epoch.
"""

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray

from nsp.data.dataset import ImageDataset, ImageItem
from nsp.data.identity import digest_of
from nsp.data.samples import MAX_CLASSES, Sample
from nsp.data.sources import ImageSource
from nsp.data.ten_crop import centre_of
from nsp.errors import DataError
from nsp.files import read_json, write_file

logger = logging.getLogger(__name__)
ABOUT_NAME = "codes.json"
CODES, LABELS, CLOSER = "_codes", "_labels", "_105"
_NPY = ".npy"
_GREY = 128


@dataclass(frozen=True, slots=True)
class CodeFile:
    """The files of one picture, one for every set; a PictureFile without a picture."""

    name: str
    folder: Path
    closer_folder: Path | None  # with the closer crops

    @property
    def path(self) -> Path:
        """The file of the first set."""
        return self.folder / self.name

    def size(self) -> int:
        """Return the number of bytes."""
        return self.path.stat().st_size

    def read(self) -> bytes:
        """Raise DataError: a model cannot look at codes."""
        raise DataError("codes are not a picture; give the pictures themselves")


@dataclass(frozen=True)
class CodeSource(ImageSource):
    """The pictures of a folder of codes; their files are CodeFiles."""

    folder: Path = Path()

    def about(self) -> dict[str, object]:
        """Return how the codes were made; empty if the folder does not say it."""
        path = self.folder / ABOUT_NAME
        try:
            return read_json(path) if path.exists() else {}
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is damaged ({error}); extract the codes again") from error

    def codes(
        self, index: int, uniforms: NDArray[np.float64] | None
    ) -> tuple[NDArray[np.int64], Path]:
        """Return the codes (N,) of one crop of a picture, and their file.

        Two numbers in [0, 1) choose the set and the crop; None is the centre crop of the wider set.
        """
        file = self.files[index]
        assert isinstance(file, CodeFile)
        is_wide = uniforms is None or uniforms[0] < 0.5 or file.closer_folder is None
        path = file.path if is_wide else Path(file.closer_folder or "") / file.name
        found = read_npy(path)
        if (
            found.ndim != 3
            or found.shape[0] != 1
            or 0 in found.shape
            or found.dtype.kind not in "iu"
        ):
            raise DataError(
                f"{path} has {found.dtype} {found.shape}; codes are integers (1, crops, N), with "
                "at least one crop"
            )
        num_crops = found.shape[1]
        crop = int(uniforms[1] * num_crops) if uniforms is not None else centre_of(num_crops)
        chosen: NDArray[np.int64] = found[0, crop].astype(np.int64)
        return chosen, path


def read_npy(path: Path) -> NDArray[np.generic]:
    """Return the array in a file; DataError naming it if it is missing or damaged."""
    try:
        found: NDArray[np.generic] = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = "is missing" if not path.exists() else "is damaged"
        raise DataError(f"{path} {reason}; extract the codes again") from error
    return found


def is_code_folder(place: str) -> bool:
    """Return whether a folder holds codes and their labels."""
    return Path(place).is_dir() and bool(_codes_dirs(Path(place)))


def _codes_dirs(root: Path) -> Sequence[Path]:
    found = sorted(root.glob(f"*{CODES}"))
    return [each for each in found if each.is_dir() and _labels_of(each).is_dir()]


def _labels_of(codes: Path) -> Path:
    return codes.with_name(codes.name.removesuffix(CODES) + LABELS)


def open_codes(place: str) -> CodeSource:
    """Return the pictures of a folder of codes, with its set of closer crops if there is one.

    Raises DataError for several sets in it, a picture without a label, and bad labels.
    """
    root = Path(place)
    several = _codes_dirs(root)
    if len(several) != 1:
        found = ", ".join(each.name for each in several)
        raise DataError(f"{root} has several sets of codes ({found}); keep one, or move the others")
    codes = several[0]
    beside = root.with_name(root.name + CLOSER) / codes.name
    closer = beside if beside.is_dir() else None
    names = [each for each in os.listdir(codes) if each.endswith(_NPY)]
    names.sort(key=lambda name: (len(name), name))
    if not names:
        raise DataError(f"{codes} has no .npy files; extract codes with nsp data cache --ten-crop")
    classes = _classes(_labels_of(codes), names)
    samples = tuple(
        Sample(name.removesuffix(_NPY), (), int(number))
        for name, number in zip(names, classes, strict=True)
    )
    return CodeSource(
        samples=samples,
        class_names=tuple(map(str, range(int(classes.max()) + 1))),
        files=tuple(CodeFile(name, codes, closer) for name in names),
        digests=tuple(digest_of(f"{each.name} {each.class_id}".encode()) for each in samples),
        folder=root,
    )


def _classes(folder: Path, names: Sequence[str]) -> NDArray[np.int64]:
    """Return the class of every picture, from the one file that an earlier run kept if it fits.

    Otherwise the labels are read one by one, and kept: opening 1.28 million files takes minutes.
    """
    kept, key = folder.with_name(folder.name + ".npz"), _key(folder, names)
    try:
        with np.load(kept, allow_pickle=False) as found:
            if str(found["key"]) == key:
                classes: NDArray[np.int64] = found["classes"]
                return classes
    except (OSError, ValueError, KeyError, EOFError, TypeError, BadZipFile):
        pass  # it is made again
    read = np.fromiter((_class_in(folder / name) for name in names), np.int64, len(names))
    try:
        with write_file(kept) as partial, partial.open("wb") as file:
            np.savez(file, key=np.array(key), classes=read)
    except OSError as error:
        logger.warning("labels are read again at every start: %s cannot be kept (%s)", kept, error)
    return read


def _class_in(path: Path) -> int:
    """Return the class in a file; DataError if it is none."""
    label = read_npy(path)
    if label.size != 1 or label.dtype.kind not in "iu" or not 0 <= int(label.item()) < MAX_CLASSES:
        raise DataError(f"{path} is not the number of one class")
    return int(label.item())


def _key(folder: Path, names: Sequence[str]) -> str:
    """Return a digest of the names, sizes and times of the labels; DataError for a missing one."""
    digest = hashlib.sha256()
    for name in names:
        try:
            found = os.stat(folder / name)
        except OSError as error:
            raise DataError(f"{folder / name} is missing; extract the codes again") from error
        digest.update(f"{name} {found.st_size} {found.st_mtime_ns}\n".encode(errors="replace"))
    return digest.hexdigest()


class CodeDataset(ImageDataset):
    """The items of a CodeSource: classes, and grey in place of pictures; `drawn_codes` has more."""

    source: CodeSource

    def __getitem__(self, index: int) -> ImageItem:
        """Return the class of a picture that nobody has."""
        grey = torch.full((1, 1, 1), _GREY, dtype=torch.uint8)
        side, class_id = self.image_size_px, self.source.samples[index].class_id
        return {
            "image": grey.expand(3, side, side),
            "caption": "",
            "class_id": -1 if class_id is None else class_id,
            "index": index,
        }

    def drawn_codes(self, index: int) -> tuple[NDArray[np.int64], Path]:
        """Return the codes (N,) of the crop of this epoch, and their file.

        They follow from (seed, epoch, index) alone; unless training, from the index.
        """
        if not self.train:
            return self.source.codes(index, None)
        key = np.array([self.seed, self._epoch_now()], np.uint64)
        counter = np.array([0, 0, 0, index], np.uint64)
        uniforms = np.random.Generator(np.random.Philox(key=key, counter=counter)).random(2)
        return self.source.codes(index, uniforms)
