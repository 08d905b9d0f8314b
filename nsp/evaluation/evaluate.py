"""Compares a set of pictures with a reference set: from two archives and an Inception to figures.

Pictures are read batch by batch. What stays in memory is the features of all pictures for precision
and recall (400 MB for 50,000) and one covariance per kind of features.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nsp.data.picture_archive import (
    PICTURES,
    PictureArchive,
    open_pictures,
    part_names,
    read_floats,
)
from nsp.errors import DataError
from nsp.evaluation.features import Features
from nsp.evaluation.metrics import (
    IS_CHUNK,
    NEIGHBOURS,
    Moments,
    Statistics,
    check_count,
    frechet_distance,
    inception_score,
    is_covariance,
    precision_recall,
)

OnProgress = Callable[[str, int, int], None]  # activity, done, total


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The figures of one set of pictures, and what they were computed from."""

    fid: float
    sfid: float | None  # None: the Inception has no spatial features, or the reference no mu_s
    inception_score: float
    precision: float | None  # None: the reference has statistics only
    recall: float | None
    num_samples: int
    num_references: int  # pictures in the reference; 0 if it has statistics only
    statistics: str  # of the reference: "precomputed" or "of its pictures"
    features: str  # the Inception in words
    is_comparable: bool  # with published figures
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for programs."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, eq=False)
class _Measured:
    """Features of all pictures of an archive, and their statistics if they are needed."""

    features_ND: Tensor
    statistics: tuple[Statistics, Statistics | None] | None  # of features, of spatial features


@dataclass(frozen=True)
class _Measure:
    """How features are computed: everything but the pictures."""

    features: Features
    batch_size: int
    device: torch.device
    show: OnProgress


def evaluate(
    reference: Path,
    sample: Path,
    features: Features,
    *,
    batch_size: int = 32,
    device: torch.device | None = None,
    on_progress: OnProgress | None = None,
) -> Evaluation:
    """Return FID, sFID, inception score, precision and recall of the pictures in `sample`.

    Both are .npz archives of uint8 pictures (`arr_0`). The reference may also have, or only have,
    the statistics mu, sigma, mu_s and sigma_s, as ADM's reference archives do: they are used.
    Raises DataError in one line for an archive that cannot be used or has too few pictures, before
    the features of all pictures, which take hours.
    """
    started = time.perf_counter()
    show = on_progress or (lambda activity, done, total: None)
    how = _Measure(features, batch_size, device or torch.device("cpu"), show)
    pictures, references, names = _open(reference, sample)
    # TF32 in convolutions would change the figures in the second digit after the point.
    exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    with torch.inference_mode(), exact:
        widths = _widths(pictures, how)
        _check_counts(pictures, references, widths, of_references="mu" not in names)
        precomputed = _read_statistics(reference, names, widths) if "mu" in names else None
        made = _measure(pictures, how, "samples", with_statistics=True)
        known = None
        if references is not None:
            known = _measure(references, how, "references", with_statistics=precomputed is None)
        expected, expected_spatial = precomputed or _statistics(known)
        pool, spatial = _statistics(made)
        show("figures", 0, 3)
        fid = frechet_distance(expected, pool)
        sfid = None
        if spatial is not None and expected_spatial is not None:
            sfid = frechet_distance(expected_spatial, spatial)
        show("figures", 1, 3)
        score = inception_score(_probabilities(made.features_ND, how))
        show("figures", 2, 3)
        both: tuple[float | None, float | None] = (None, None)
        if known is not None:
            both = precision_recall(known.features_ND, made.features_ND)
        show("figures", 3, 3)
    return Evaluation(
        fid=fid,
        sfid=sfid,
        inception_score=score,
        precision=both[0],
        recall=both[1],
        num_samples=pictures.shape[0],
        num_references=0 if references is None else references.shape[0],
        statistics="of its pictures" if precomputed is None else "precomputed",
        features=features.name,
        is_comparable=features.is_comparable,
        seconds=time.perf_counter() - started,
    )


def _open(
    reference: Path, sample: Path
) -> tuple[PictureArchive, PictureArchive | None, frozenset[str]]:
    """Return the samples, the references if there are any, and the names in the reference."""
    pictures, names = open_pictures(sample), part_names(reference)
    if "mu" not in names and PICTURES not in names:
        raise DataError(
            f"{reference} has neither pictures ({PICTURES}) nor statistics (mu, sigma); it has "
            f"{', '.join(sorted(names)[:8]) or 'nothing'}"
        )
    references = open_pictures(reference) if PICTURES in names else None
    if references is not None and references.shape[1:] != pictures.shape[1:]:
        sizes = [f"{each.shape[2]} x {each.shape[1]} px" for each in (pictures, references)]
        raise DataError(
            f"{sample} has pictures of {sizes[0]}, but {reference} of {sizes[1]}; make them of the "
            "same size, for example with: nsp generate --image-size-eval"
        )
    return pictures, references, names


def _measure(
    archive: PictureArchive, how: _Measure, activity: str, *, with_statistics: bool
) -> _Measured:
    """Return the features of all pictures; DataError naming the archive if one is not finite."""
    moments, spatial_moments = Moments(), Moments()
    kept: Tensor | None = None
    spatial: Tensor | None = None
    done, count = 0, archive.shape[0]
    for block in archive.blocks(how.batch_size):
        found, spatial = how.features.activations(torch.from_numpy(block).to(how.device))
        if not bool(found.isfinite().all()):
            raise DataError(f"{how.features.name}: a feature of {archive.path} is not finite")
        if kept is None:
            kept = torch.empty(count, found.shape[1], device=how.device)
        kept[done : done + len(block)] = found
        if with_statistics:
            moments.add(found.cpu().numpy())
            if spatial is not None:
                spatial_moments.add(spatial.cpu().numpy())
        done += len(block)
        how.show(activity, done, count)
    assert kept is not None  # an archive has at least one picture
    if not with_statistics:
        return _Measured(kept, None)
    spatial_statistics = None if spatial is None else spatial_moments.statistics()
    return _Measured(kept, (moments.statistics(), spatial_statistics))


def _statistics(measured: _Measured | None) -> tuple[Statistics, Statistics | None]:
    assert measured is not None
    assert measured.statistics is not None
    return measured.statistics


def _widths(archive: PictureArchive, how: _Measure) -> tuple[int, int | None]:
    """Return the number of features of a picture, and of spatial ones if there are any."""
    first = next(archive.blocks(1))
    found, spatial = how.features.activations(torch.from_numpy(first).to(how.device))
    return found.shape[1], None if spatial is None else spatial.shape[1]


def _check_counts(
    samples: PictureArchive,
    references: PictureArchive | None,
    widths: tuple[int, int | None],
    *,
    of_references: bool,
) -> None:
    """Raise DataError naming an archive with too few pictures for what is computed from them."""
    covered = [samples]
    if references is not None:
        if references.shape[0] <= NEIGHBOURS:
            raise DataError(
                f"{references.path}: {references.shape[0]} pictures are too few for precision and "
                f"recall; at least {NEIGHBOURS + 1} are needed"
            )
        covered += [references] * of_references
    for archive in covered:
        try:
            check_count(archive.shape[0], max(width or 0 for width in widths))
        except DataError as error:
            raise DataError(f"{archive.path}: {error}") from None


def _read_statistics(
    path: Path, names: frozenset[str], widths: tuple[int, int | None]
) -> tuple[Statistics, Statistics | None]:
    """Return the statistics in a reference archive; of the spatial features, if it has them."""

    def read(mean: str, covariance: str, width: int) -> Statistics:
        found = Statistics(
            read_floats(path, mean, shape=(width,)),
            read_floats(path, covariance, shape=(width, width)),
        )
        if not is_covariance(found.covariance_DD):
            raise DataError(
                f"{path}: {covariance} is not a covariance: it is not symmetric, or has an "
                "eigenvalue below 0"
            )
        return found

    if widths[1] is None or "mu_s" not in names:
        return read("mu", "sigma", widths[0]), None
    return read("mu", "sigma", widths[0]), read("mu_s", "sigma_s", widths[1])


def _probabilities(features_ND: Tensor, how: _Measure) -> Iterator[NDArray[np.float32]]:
    """Yield the class probabilities of the pictures, in the chunks of the inception score."""
    for start in range(0, len(features_ND), IS_CHUNK):
        chunk_ND = features_ND[start : start + IS_CHUNK]
        yield how.features.probabilities(chunk_ND).cpu().numpy()
