"""The arithmetic of the figures, on features and probabilities; float64 except for distances.

In names of arrays: N pictures, M other pictures, D features, K classes.

Source: github.com/openai/guided-diffusion, evaluations/evaluator.py, with two departures. The
Frechet distance takes the trace of a matrix square root from singular values, which are real and
not negative, where the original takes scipy's square root of a product that may be singular. And
means are summed in float64, where the original sums float32 numbers.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nsp.errors import DataError

NEIGHBOURS = 3  # k of precision and recall
IS_CHUNK = 5000  # pictures of one inception score; the result is the mean of all chunks
_ROUNDING = 1e-5  # of a covariance, relative to its largest value
_SUMMED = 1024  # pictures whose products are added up at once
_BLOCK = 4096  # pictures on each side of a block of distances: 64 MiB in float32


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean and covariance of features."""

    mean_D: NDArray[np.float64]
    covariance_DD: NDArray[np.float64]


class Moments:
    """Adds up the statistics of features, batch by batch; memory is D x D whatever their number."""

    def __init__(self) -> None:
        self.count = 0
        self._waiting: list[NDArray[np.float64]] = []
        self._num_waiting = 0
        self._shift_D: NDArray[np.float64] = np.zeros(0)
        self._sum_D: NDArray[np.float64] = np.zeros(0)
        self._products_DD: NDArray[np.float64] = np.zeros((0, 0))

    def add(self, features_ND: NDArray[np.floating]) -> None:
        """Add the features of some pictures."""
        self._waiting.append(features_ND.astype(np.float64))
        self._num_waiting += len(features_ND)
        if self._num_waiting >= _SUMMED:
            self._sum_up()

    def _sum_up(self) -> None:
        """Add what waits: one product of many rows takes a tenth of the time of many small ones."""
        batch_ND = np.concatenate(self._waiting)
        if self.count == 0:
            # Numbers relative to about the mean: products of large ones would lose digits.
            self._shift_D = batch_ND.mean(axis=0)
            self._sum_D = np.zeros_like(self._shift_D)
            self._products_DD = np.zeros((batch_ND.shape[1], batch_ND.shape[1]))
        batch_ND -= self._shift_D
        self.count += len(batch_ND)
        self._sum_D += batch_ND.sum(axis=0)
        self._products_DD += batch_ND.T @ batch_ND
        self._waiting, self._num_waiting = [], 0

    def statistics(self) -> Statistics:
        """Return mean and covariance, the latter divided by N - 1."""
        if self._waiting:
            self._sum_up()
        check_count(self.count, len(self._sum_D))
        mean_D = self._sum_D / self.count
        centred_DD = self._products_DD - self.count * np.outer(mean_D, mean_D)
        return Statistics(self._shift_D + mean_D, centred_DD / (self.count - 1))


def check_count(num_images: int, num_features: int) -> None:
    """Raise DataError for fewer pictures than a covariance of full rank needs."""
    if num_images <= num_features:
        raise DataError(
            f"{num_images} pictures are too few for the covariance of {num_features} features; "
            f"at least {num_features + 1} are needed, and published figures use 50,000"
        )


def is_covariance(array_DD: NDArray[np.float64]) -> bool:
    """Return whether an array is symmetric without eigenvalues below 0, up to float32's rounding.

    The product of N pictures' features in float32 has errors of about 1e-7 of its largest value.
    """
    scale = float(np.abs(array_DD).max())
    if not np.allclose(array_DD, array_DD.T, rtol=0, atol=_ROUNDING * scale):
        return False
    lowest = float(np.linalg.eigvalsh(array_DD)[0])
    return lowest >= -_ROUNDING * scale * len(array_DD)


def frechet_distance(one: Statistics, other: Statistics) -> float:
    """Return |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), the distance of two normal distributions.

    The trace of the square root is the sum of the singular values of A1^T A2 with C = A A^T, so no
    square root of a product is computed, which may have no real one in floating-point numbers.
    Source: Heusel et al. 2017, arXiv:1706.08500, eq. 6.
    """
    difference_D = one.mean_D - other.mean_D
    roots = _root(one.covariance_DD).T @ _root(other.covariance_DD)
    shared = float(np.linalg.svd(roots, compute_uv=False).sum())
    traces = float(np.trace(one.covariance_DD) + np.trace(other.covariance_DD))
    return float(difference_D @ difference_D) + traces - 2 * shared


def _root(covariance_DD: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return A (D, D) with C = A A^T; eigenvalues below 0 are rounding errors of 0."""
    values_D, vectors_DD = np.linalg.eigh((covariance_DD + covariance_DD.T) / 2)
    return np.asarray(vectors_DD * np.sqrt(values_D.clip(min=0)))


def inception_score(chunks: Iterable[NDArray[np.floating]]) -> float:
    """Return the mean over chunks (N, K) of exp(mean KL(class probabilities || their mean)).

    Source: Salimans et al. 2016, arXiv:1606.03498, section 4.
    """
    scores = []
    for chunk_NK in chunks:
        p_NK = chunk_NK.astype(np.float64)
        tiny = np.finfo(np.float64).tiny  # 0 log 0 is 0
        ratio_NK = np.log(p_NK.clip(min=tiny)) - np.log(p_NK.mean(axis=0).clip(min=tiny))
        scores.append(np.exp((p_NK * ratio_NK).sum(axis=1).mean()))
    return float(np.mean(scores))


def precision_recall(
    reference_ND: Tensor,
    sample_MD: Tensor,
    *,
    neighbours: int = NEIGHBOURS,
    dtype: torch.dtype = torch.float16,
) -> tuple[float, float]:
    """Return the shares of samples near references, and of references near samples.

    Near: within the distance from a picture to its `neighbours`-th nearest of its own set. Squared
    distances are computed in `dtype` on the device of the features; a block in which float16 is not
    finite is computed in float32, as the ADM evaluator does.
    Source: Kynkaanniemi et al. 2019, arXiv:1904.06991.
    """
    for name, features in (("reference", reference_ND), ("sample", sample_MD)):
        if len(features) <= neighbours:
            raise DataError(f"the {name} has {len(features)} pictures; precision and recall need 4")
    reference_radii_N = _radii(reference_ND, neighbours, dtype)
    sample_radii_M = _radii(sample_MD, neighbours, dtype)
    reference_is_near_N = torch.zeros_like(reference_radii_N, dtype=torch.bool)
    sample_is_near_M = torch.zeros_like(sample_radii_M, dtype=torch.bool)
    for rows in _slices(len(reference_ND)):
        for columns in _slices(len(sample_MD)):
            distance_NM = _distances(reference_ND[rows], sample_MD[columns], dtype)
            near_NM = distance_NM <= sample_radii_M[columns]
            reference_is_near_N[rows] |= near_NM.any(dim=1)
            near_NM = distance_NM <= reference_radii_N[rows, None]
            sample_is_near_M[columns] |= near_NM.any(dim=0)
    return (
        sample_is_near_M.double().mean().item(),
        reference_is_near_N.double().mean().item(),
    )


def _radii(features_ND: Tensor, neighbours: int, dtype: torch.dtype) -> Tensor:
    """Return the squared distance (N,) of every picture to its k-th nearest, itself not counted."""
    radii = []
    for rows in _slices(len(features_ND)):
        nearest: Tensor | None = None  # (N, k + 1), a picture itself among them
        for columns in _slices(len(features_ND)):
            found = _distances(features_ND[rows], features_ND[columns], dtype)
            found = found if nearest is None else torch.cat((nearest, found), dim=1)
            count = min(neighbours + 1, found.shape[1])
            nearest = found.topk(count, dim=1, largest=False, sorted=True).values
        assert nearest is not None
        radii.append(nearest[:, neighbours])
    return torch.cat(radii)


def _slices(count: int) -> Iterator[slice]:
    return (slice(start, min(start + _BLOCK, count)) for start in range(0, count, _BLOCK))


def _distances(u_ND: Tensor, v_MD: Tensor, dtype: torch.dtype) -> Tensor:
    """Return squared distances (N, M), |u|^2 - 2 u.v + |v|^2 and at least 0.

    In float16 every step is rounded to it, but sums are added up in float32, as GPUs do.
    """
    if dtype is not torch.float16:
        return _plain_distances(u_ND.to(dtype), v_MD.to(dtype))
    u_ND, v_MD = u_ND.half().float(), v_MD.half().float()
    u_norm_N1 = u_ND.square().half().float().sum(dim=1, keepdim=True).half()
    v_norm_1M = v_MD.square().half().float().sum(dim=1).half()
    product_NM = (u_ND @ v_MD.T).half()
    distance_NM = (u_norm_N1 - 2 * product_NM + v_norm_1M).clamp_min(0)
    if bool(distance_NM.isfinite().all()):
        return distance_NM.float()
    return _plain_distances(u_ND, v_MD)


def _plain_distances(u_ND: Tensor, v_MD: Tensor) -> Tensor:
    u_norm_N1 = u_ND.square().sum(dim=1, keepdim=True)
    v_norm_1M = v_MD.square().sum(dim=1)
    return (u_norm_N1 - 2 * (u_ND @ v_MD.T) + v_norm_1M).clamp_min(0)
