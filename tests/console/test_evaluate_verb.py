"""`nsp evaluate` prints a table, writes JSON, and refuses what it cannot use in one line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from nsp.cli import main
from nsp.console.evaluate_verb import origin
from nsp.evaluation.evaluate import Evaluation
from tests.evaluation.graph_file import small_inception
from tests.evaluation.test_inception import random_state


def nsp(*args: object) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for name, count in (("ref", 200), ("sample", 180), ("few", 9)):
        pictures = random.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", pictures)
    (tmp_path / "graph.pb").write_bytes(small_inception())
    return tmp_path


def test_the_table_has_every_figure_and_the_file_the_same_values(folder: Path) -> None:
    command = ("evaluate", folder / "ref.npz", folder / "sample.npz")
    command += ("--inception", folder / "graph.pb", "--json", folder / "found.json")
    done = nsp(*command)
    assert done.exit_code == 0, done.output
    values = json.loads((folder / "found.json").read_text())
    lines = {" ".join(line.split()[:-2]): line.split()[-2] for line in done.stdout.splitlines()}
    assert lines["FID"] == f"{values['fid']:.3f}"
    assert lines["sFID"] == f"{values['sfid']:.3f}"
    assert lines["inception score"] == f"{values['inception_score']:.2f}"
    assert lines["precision"] == f"{values['precision']:.4f}"
    assert lines["recall"] == f"{values['recall']:.4f}"
    assert "180 samples, 200 references, the ADM evaluator's Inception" in done.stdout
    assert "comparable" not in done.stdout
    assert (values["is_comparable"], values["num_samples"]) == (True, 180)
    assert len(values["inception_sha256"]) == 64
    printed = nsp(*command[:-1])
    assert json.loads(printed.stdout)["fid"] == values["fid"]


def test_torch_fidelitys_weights_need_as_many_pictures_as_features(folder: Path) -> None:
    torch.save(random_state(), folder / "weights.pth")
    inception = ("--inception", folder / "weights.pth")
    done = nsp("evaluate", folder / "ref.npz", folder / "few.npz", *inception)
    assert done.exit_code == 1
    assert "few.npz: 9 pictures are too few for the covariance of 2048 features" in done.stderr


def test_figures_that_cannot_be_compared_are_labelled() -> None:
    found = Evaluation(
        fid=1.0,
        sfid=None,
        inception_score=2.0,
        precision=0.5,
        recall=0.5,
        num_samples=50_000,
        num_references=10_000,
        statistics="precomputed",
        features="torch-fidelity's Inception",
        is_comparable=False,
        seconds=1.0,
    )
    assert origin(found) == (
        "50,000 samples, 10,000 references, torch-fidelity's Inception, FID and sFID from the "
        "reference's precomputed statistics, not comparable with published figures"
    )


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("ref.npz", "sample.npz"), 2, "no figure without an Inception"),
        (("ref.npz", "few.npz", "--inception", "graph.pb"), 1, "too few"),
        (("ref.npz", "graph.pb", "--inception", "graph.pb"), 1, "an .npz archive is needed"),
        (("ref.npz", "sample.npz", "--inception", "ref.npz"), 1, "not a GraphDef|a GraphDef is"),
        (("ref.npz", "none.npz", "--inception", "graph.pb"), 2, "does not exist"),
        (("ref.npz", "sample.npz", "--inception", "graph.pb", "--device", "x"), 2, "is unknown"),
    ],
)
def test_what_cannot_be_used_is_one_line(
    folder: Path, words: tuple[str, ...], code: int, message: str
) -> None:
    names = [folder / word if word.endswith((".npz", ".pb")) else word for word in words]
    done = nsp("evaluate", *names)
    assert done.exit_code == code, done.output
    assert any(part in done.stderr for part in message.split("|")), done.stderr
    assert done.stderr.count("\n") == 1
