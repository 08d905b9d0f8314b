"""Figures of archives, from a small graph with the names and operations of the evaluator's."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from nsp.errors import ConfigError, DataError
from nsp.evaluation.evaluate import Evaluation, evaluate
from nsp.evaluation.features import AdmInception, Features, load_features
from tests.evaluation.graph_file import small_inception

CPU = torch.device("cpu")
WIDE = 7 * 25  # spatial features of the small graph: 5 x 5 pixels


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("graph") / "graph.pb"
    path.write_bytes(small_inception())
    return path


@pytest.fixture(scope="module")
def features(graph: Path) -> Features:
    return load_features(graph, CPU)


def pictures(seed: int, count: int = 200, side: int = 16) -> NDArray[np.uint8]:
    random = np.random.default_rng(seed)
    tones = random.integers(0, 200, (count, 1, 1, 3))
    return (tones + random.integers(0, 56, (count, side, side, 3))).astype(np.uint8)


def saved(path: Path, **arrays: NDArray[np.generic]) -> Path:
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("archives")
    reference = saved(folder / "reference.npz", arr_0=pictures(1))
    sample = saved(folder / "sample.npz", arr_0=pictures(2, 190) // 2)
    return reference, sample


def figures(found: Evaluation) -> NDArray[np.float64]:
    values = (found.fid, found.sfid, found.inception_score, found.precision, found.recall)
    return np.array([np.nan if each is None else each for each in values])


def test_the_batch_size_changes_nothing(archives: tuple[Path, Path], features: Features) -> None:
    found = [evaluate(*archives, features, batch_size=size) for size in (1, 32, 500)]
    np.testing.assert_allclose(figures(found[1]), figures(found[0]), rtol=1e-4)
    np.testing.assert_allclose(figures(found[2]), figures(found[0]), rtol=1e-4)
    assert found[0].fid > 0.01
    assert (found[0].num_samples, found[0].num_references) == (190, 200)


def test_a_set_is_at_distance_0_from_itself(
    archives: tuple[Path, Path], features: Features
) -> None:
    found = evaluate(archives[0], archives[0], features)
    assert found.fid == pytest.approx(0, abs=1e-6)
    assert found.sfid == pytest.approx(0, abs=1e-5)
    assert (found.precision, found.recall) == (1, 1)
    assert found.is_comparable


def test_the_figures_are_those_of_numpys_formulas(
    archives: tuple[Path, Path], features: Features
) -> None:
    found = evaluate(*archives, features)
    made = []
    for path in archives:
        with np.load(path) as archive:
            pool, spatial = features.activations(torch.from_numpy(archive["arr_0"]))
        assert spatial is not None
        assert (pool.shape[1], spatial.shape[1]) == (6, WIDE)
        made.append((pool.numpy().astype(float), spatial.numpy().astype(float)))
    for kind, figure in ((0, found.fid), (1, found.sfid)):
        one, other = made[0][kind], made[1][kind]
        covariances = [np.cov(each, rowvar=False) for each in (one, other)]
        roots = np.linalg.eigvals(covariances[0] @ covariances[1]).real.clip(min=0) ** 0.5
        distance = ((one.mean(0) - other.mean(0)) ** 2).sum()
        expected = distance + sum(map(np.trace, covariances)) - 2 * roots.sum()
        assert figure == pytest.approx(expected, rel=1e-4)
    p = features.probabilities(torch.from_numpy(made[1][0]).float()).numpy().astype(float)
    expected = np.exp((p * np.log(p / p.mean(axis=0))).sum(axis=1).mean())
    assert found.inception_score == pytest.approx(expected, rel=1e-6)


def test_precomputed_statistics_replace_those_of_the_reference_pictures(
    archives: tuple[Path, Path], features: Features, tmp_path: Path
) -> None:
    with np.load(archives[0]) as archive:
        images = archive["arr_0"]
    pool, spatial = features.activations(torch.from_numpy(images))
    assert spatial is not None
    whole = {}
    for name, each in (("", pool.numpy()), ("_s", spatial.numpy())):
        whole |= {f"mu{name}": each.mean(axis=0), f"sigma{name}": np.cov(each, rowvar=False)}
    both = evaluate(saved(tmp_path / "both.npz", arr_0=images[:50], **whole), archives[1], features)
    plain = evaluate(*archives, features)
    assert both.statistics == "precomputed"
    assert (both.fid, both.sfid) == pytest.approx((plain.fid, plain.sfid), rel=1e-4)
    assert both.precision is not None
    only = evaluate(saved(tmp_path / "only.npz", **whole), archives[1], features)
    assert only.fid == pytest.approx(plain.fid, rel=1e-4)
    assert (only.precision, only.recall, only.num_references) == (None, None, 0)
    short = {"mu": whole["mu"], "sigma": whole["sigma"]}
    assert evaluate(saved(tmp_path / "pool.npz", **short), archives[1], features).sfid is None
    wrong = {**whole, "mu": np.zeros(2048)}
    with pytest.raises(DataError, match=r"mu is float64 \(2048,\); expected float numbers \(6,\)"):
        evaluate(saved(tmp_path / "wrong.npz", **wrong), archives[1], features)
    with pytest.raises(DataError, match="has no array sigma"):
        evaluate(saved(tmp_path / "half.npz", mu=whole["mu"]), archives[1], features)


@pytest.mark.parametrize("change", ["negative", "not symmetric"])
def test_statistics_that_nothing_has_are_refused(
    change: str, archives: tuple[Path, Path], features: Features, tmp_path: Path
) -> None:
    sigma = np.eye(6)
    sigma[0, 1 if change == "not symmetric" else 0] = -1
    wrong = saved(tmp_path / "wrong.npz", mu=np.zeros(6), sigma=sigma)
    with pytest.raises(DataError, match=r"wrong.npz: sigma is not a covariance"):
        evaluate(wrong, archives[1], features)


@pytest.mark.parametrize("damage", ["mu of another size", "no sigma_s", "few references", "few"])
def test_a_bad_reference_is_refused_before_the_features_of_all_pictures(
    damage: str, archives: tuple[Path, Path], features: Features, tmp_path: Path
) -> None:
    arrays: dict[str, NDArray[np.generic]] = {"mu": np.zeros(6), "sigma": np.eye(6)}
    if damage == "mu of another size":
        arrays["mu"] = np.zeros(5)
    elif damage == "no sigma_s":
        arrays["mu_s"] = np.zeros(WIDE)
    else:
        arrays = {} if damage == "few" else arrays
        arrays["arr_0"] = pictures(0, 3)
    shown: list[str] = []
    with pytest.raises(DataError, match=r"bad\.npz"):
        evaluate(
            saved(tmp_path / "bad.npz", **arrays),
            archives[1],
            features,
            on_progress=lambda activity, done, total: shown.append(activity),
        )
    assert not shown


def test_archives_that_do_not_fit_are_refused_before_any_work(
    archives: tuple[Path, Path], features: Features, tmp_path: Path
) -> None:
    large = saved(tmp_path / "large.npz", arr_0=pictures(3, 4, 32))
    with pytest.raises(DataError, match=r"pictures of 32 x 32 px, but .* of 16 x 16 px"):
        evaluate(archives[0], large, features)
    with pytest.raises(DataError, match=r"neither pictures .arr_0. nor statistics .* it has a"):
        evaluate(saved(tmp_path / "none.npz", a=np.zeros(3)), archives[1], features)
    few = saved(tmp_path / "few.npz", arr_0=pictures(3, 20))
    with pytest.raises(DataError, match=r"few.npz: 20 pictures are too few .* 175 features"):
        evaluate(archives[0], few, features)


def test_without_a_file_the_error_says_which_is_needed_and_where_it_is_described() -> None:
    with pytest.raises(ConfigError, match=r"graph_def.pb, .* docs/evaluate.md") as e:
        load_features(None, CPU)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"<!doctype html><html>", "is a web page"),
        (b"PK\x03\x04 no pictures", "cut short"),
        (b"\x0a\x06\x0a\x01a\x12\x01b", "has no product softmax/logits/MatMul"),
    ],
)
def test_another_file_is_refused_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_features(tmp_path / "file", CPU)


def test_the_softmax_has_no_bias(graph: Path) -> None:
    features = AdmInception(graph, CPU)
    assert features.probabilities(torch.zeros(1, 6)).tolist() == [pytest.approx([0.2] * 5)]
