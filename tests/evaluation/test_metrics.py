"""The figures equal the goldens; blocks and batches change nothing."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file

from nsp.errors import DataError
from nsp.evaluation import metrics
from nsp.evaluation.metrics import (
    Moments,
    Statistics,
    frechet_distance,
    inception_score,
    precision_recall,
)

GOLDENS = load_file(Path(__file__).parents[1] / "goldens/evaluation/io.safetensors")


def golden(name: str) -> NDArray[np.float64]:
    return GOLDENS[f"metrics.{name}"].astype(np.float64)


def statistics(features: NDArray[np.float64], *, batch: int = 64) -> Statistics:
    moments = Moments()
    for start in range(0, len(features), batch):
        moments.add(features[start : start + batch])
    return moments.statistics()


def test_the_frechet_distance_equals_the_golden() -> None:
    found = frechet_distance(
        statistics(golden("ref_features")), statistics(golden("sample_features"))
    )
    # The original computes the means and their distance in float32; otherwise it is 1e-15.
    assert found == pytest.approx(float(golden("fid")), rel=3e-8)


def test_the_inception_score_equals_the_golden() -> None:
    probabilities = golden("is_probs")
    found = inception_score(probabilities[start : start + 40] for start in (0, 40, 80))
    assert found == pytest.approx(float(golden("inception_score_split40")), rel=1e-12)


@pytest.mark.parametrize("block", [4096, 32, 7])
def test_precision_and_recall_equal_the_golden_in_blocks_of_any_size(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "_BLOCK", block)
    features = (torch.from_numpy(golden(f"{n}_features")) for n in ("ref", "sample"))
    found = precision_recall(*features, dtype=torch.float64)
    assert found == pytest.approx(tuple(golden("precision_recall")), abs=1e-12)


def test_float16_distances_change_precision_and_recall_by_few_pictures() -> None:
    features = [torch.from_numpy(golden(f"{n}_features")).float() for n in ("ref", "sample")]
    found = precision_recall(*features)
    assert found == pytest.approx(tuple(golden("precision_recall")), abs=0.02)


def test_distances_too_large_for_float16_are_computed_in_float32() -> None:
    features = [300 * torch.from_numpy(golden(f"{n}_features")).float() for n in ("ref", "sample")]
    assert precision_recall(*features) == precision_recall(*features, dtype=torch.float32)


@pytest.mark.parametrize("batch", [1, 7, 180])
def test_mean_and_covariance_are_numpys_whatever_the_batch_and_however_far_from_0(
    batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "_SUMMED", 50)
    features = golden("ref_features") + 1e5
    found = statistics(features, batch=batch)
    np.testing.assert_allclose(found.mean_D, features.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(found.covariance_DD, np.cov(features, rowvar=False), atol=1e-9)


def test_the_distance_of_singular_covariances_is_real_and_right() -> None:
    """One factor is missing on either side: what the two share is known in closed form."""
    directions = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0]
    variances = np.array([[4.0, 1, 0, 9, 0, 1e-12], [1.0, 1, 5, 0, 0, 1e-12]])
    one, other = (
        Statistics(np.zeros(6), directions @ np.diag(each) @ directions.T) for each in variances
    )
    expected = float(((np.sqrt(variances[0]) - np.sqrt(variances[1])) ** 2).sum())
    assert frechet_distance(one, other) == pytest.approx(expected, abs=1e-6)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)


def test_too_few_pictures_for_a_covariance_are_refused() -> None:
    with pytest.raises(DataError, match=r"12 pictures are too few .* at least 13"):
        statistics(golden("ref_features")[:12])


def test_a_class_that_never_occurs_adds_nothing_to_the_score() -> None:
    chunk = np.array([[1.0, 0, 0], [0, 1, 0]])
    assert inception_score([chunk]) == pytest.approx(2)
