"""An image's random numbers or codes may come from files, and a wrong file is named."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from nsp.cli import main
from nsp.pipeline.pipeline import load_pipeline
from tests.families.next_scale.models import new_tiny_checkpoint

EMPTY_ZIP = b"PK\x05\x06" + bytes(18)  # an .npz without arrays


def generate(checkpoint: Path, output: Path, *words: object) -> Result:
    fixed = ["generate", "--checkpoint", checkpoint, "--output-dir", output]
    fixed += ["--prompt", "red apple"]
    return CliRunner().invoke(main, [str(word) for word in (*fixed, *words)])


def picture(folder: Path, seed: int) -> np.ndarray:
    with Image.open(folder / f"000_red-apple_seed{seed}.png") as image:
        return np.asarray(image)


def test_codes_of_a_file_are_kept_for_every_image(tiny_checkpoint: Path, tmp_path: Path) -> None:
    pipe = load_pipeline(tiny_checkpoint)
    made = pipe.generate(prompts=["red apple"], seed=3, trace=True)
    codes = np.concatenate(made.trace.tokens, 1)[0]
    np.save(tmp_path / "codes.npy", codes)
    words = ("--forced-tokens", tmp_path / "codes.npy", "--num-images", 2, "--seed", 8)
    result = generate(tiny_checkpoint, tmp_path / "out", *words)
    assert result.exit_code == 0, result.output
    assert np.array_equal(picture(tmp_path / "out", 8), made.images[0])
    with Image.open(tmp_path / "out/001_red-apple_seed9.png") as second:
        assert np.array_equal(np.asarray(second), made.images[0])


def test_each_image_has_its_own_row_of_noise(tmp_path: Path) -> None:
    checkpoint = new_tiny_checkpoint(tmp_path / "checkpoint")
    pipe = load_pipeline(checkpoint)
    shape = pipe.family.given(pipe.config)["noise"].shape
    rows = np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32)
    np.save(tmp_path / "noise.npy", rows)
    words = ("--noise", tmp_path / "noise.npy", "--num-images", 2, "--seed", 1)
    assert generate(checkpoint, tmp_path / "out", *words).exit_code == 0
    np.save(tmp_path / "noise.npy", rows[0])
    assert generate(checkpoint, tmp_path / "alone", *words[:2], "--seed", 5).exit_code == 0
    assert np.array_equal(picture(tmp_path / "out", 1), picture(tmp_path / "alone", 5))


@pytest.mark.parametrize(
    ("write", "problem"),
    [
        (lambda path: np.save(path, np.zeros(3, np.int64)), "the array is (3,); an image takes"),
        (lambda path: path.write_text("no array"), "is not an .npy file with one array of numbers"),
        (lambda path: path.write_bytes(EMPTY_ZIP), "it is an archive of arrays"),
        (lambda path: np.save(path, np.array([{}]), allow_pickle=True), "is not an .npy file"),
    ],
)
def test_a_wrong_file_is_one_line(tiny_checkpoint: Path, tmp_path: Path, write, problem) -> None:
    write(tmp_path / "codes.npy")
    result = generate(tiny_checkpoint, tmp_path / "out", "--forced-tokens", tmp_path / "codes.npy")
    assert result.exit_code != 0
    assert problem in result.output
    assert not (tmp_path / "out").exists()


def test_an_array_of_another_family_is_refused_by_name(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    np.save(tmp_path / "noise.npy", np.zeros(3, np.float32))
    result = generate(tiny_checkpoint, tmp_path / "out", "--noise", tmp_path / "noise.npy")
    assert result.exit_code != 0
    assert "--noise is not a setting of family var" in result.output
