"""Codes of crops are extracted as the public code does it, and read from its folders."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from nsp.artifacts.systems import save_checkpoint
from nsp.cli import main
from nsp.data.codes import CodeDataset, CodeFile, open_codes, read_npy
from nsp.data.ten_crop import centre_crop, crops_of
from nsp.errors import ConfigError, DataError
from nsp.families.next_patch.system import NextPatchSystem
from nsp.family.objective import TrainingData
from nsp.family.recipe import DataConfig, OptimizerConfig, PhaseConfig, RunConfig
from nsp.raster.predictor_phase import PredictorObjective, PredictorSettings
from nsp.training.whole_run import train
from tests.families.next_patch.models import golden
from tests.goldens.llamagen_tiny.fixtures import config, tensors

IO, SIZE = tensors(), config()["vq"]["image_size"]
NAME = "imagenet256_code_c2i_flip_ten_crop"
CODES, LABELS = f"imagenet{SIZE}_codes", f"imagenet{SIZE}_labels"


def source() -> Image.Image:
    return Image.fromarray(IO["tencrop.source_uint8"].numpy())


def test_crops_are_the_public_ones() -> None:
    for name, crop_range in (("1_1", 1.1), ("1_05", 1.05)):
        centre = centre_crop(source(), int(SIZE * crop_range))
        assert np.array_equal(centre, IO[f"tencrop.{name}.center_uint8"].numpy())
    crops = crops_of(source(), SIZE, crop_range=1.1, ten_crop=True, flip=False)
    assert np.array_equal(crops, IO["tencrop.1_1.crops"].numpy())
    pair = crops_of(source(), SIZE, crop_range=1, ten_crop=False, flip=True)
    assert np.array_equal(pair[0], pair[1][..., ::-1])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures of two classes, a checkpoint, and the codes of both processes."""
    root = tmp_path_factory.mktemp("codes")
    for index in range(4):
        folder = root / "pictures" / ("cat", "dog")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        picture = source() if index == 0 else Image.new("RGB", (40, 50), (60 * index, 9, 9))
        picture.save(folder / f"{index}.png")
    save_checkpoint(root / "checkpoint", golden(), notes={})
    extract(root, "--shard", "0/2")
    result = CliRunner().invoke(main, command(root), env={"RANK": "1", "WORLD_SIZE": "2"})
    assert result.exit_code == 0, result.output
    return root


def command(root: Path, *more: str) -> list[str]:
    fixed = ["data", "cache", str(root / "pictures"), "--checkpoint", str(root / "checkpoint")]
    options = ["--output", str(root / NAME), "--ten-crop", "--crop-range", "1.1", "1.05"]
    return [*fixed, *options, "--image-size", str(SIZE), *more]


def extract(root: Path, *more: str) -> str:
    result = CliRunner().invoke(main, command(root, *more))
    assert result.exit_code == 0, result.output
    return result.output


def test_extracted_codes_are_the_public_ones(place: Path) -> None:
    for name, folder in (("1_1", NAME), ("1_05", f"{NAME}_105")):
        codes = np.load(place / folder / CODES / "0.npy")
        assert np.array_equal(codes, IO[f"tencrop.{name}.codes"].numpy())
        assert [int(np.load(place / folder / LABELS / f"{n}.npy")[0]) for n in range(4)] == [
            0,
            0,
            1,
            1,
        ]


def test_a_run_that_was_stopped_makes_only_what_is_missing(place: Path) -> None:
    lost = place / f"{NAME}_105" / LABELS / "2.npy"
    before = np.load(place / f"{NAME}_105" / CODES / "2.npy")
    lost.unlink()
    assert "1 of 4 pictures in part 0 of 1" in extract(place)
    assert lost.exists()
    assert np.array_equal(np.load(place / f"{NAME}_105" / CODES / "2.npy"), before)
    assert "0 of 4 pictures" in extract(place)


def test_crops_are_drawn_by_seed_and_epoch_from_both_sets(place: Path) -> None:
    opened = open_codes(str(place / NAME))
    data = CodeDataset(opened, SIZE, train=True, crop=False, seed=3)
    sets = [np.load(place / f / CODES / "0.npy")[0].tolist() for f in (NAME, f"{NAME}_105")]
    drawn = []
    for epoch in range(60):
        data.set_epoch(epoch)
        drawn.append(data.drawn_codes(0)[0].tolist())
    closer = sum(codes in sets[1] for codes in drawn)
    assert all(codes in sets[0] or codes in sets[1] for codes in drawn)
    assert 15 < closer < 45
    assert len({tuple(codes) for codes in drawn}) > 12  # of at most 20 crops
    data.set_epoch(7)
    assert data.drawn_codes(0)[0].tolist() == drawn[7]


def test_codes_are_those_of_the_centre_unless_training(place: Path) -> None:
    opened = open_codes(str(place / NAME))
    data = CodeDataset(opened, SIZE, train=False, crop=False, seed=3)
    found, file = data.drawn_codes(0)
    assert file == place / NAME / CODES / "0.npy"
    crops = IO["tencrop.1_1.crops"].numpy()
    wide = centre_crop(source(), int(SIZE * 1.1)).transpose(2, 0, 1)
    edge = round((wide.shape[1] - SIZE) / 2)
    assert np.array_equal(crops[4], wide[:, edge : edge + SIZE, edge : edge + SIZE])
    assert np.array_equal(found, np.load(file)[0, 4])


def test_the_centre_of_a_mirrored_pair_is_its_first_picture(tmp_path: Path) -> None:
    codes = np.stack([np.zeros(64, int), np.ones(64, int)])[None]
    opened = open_codes(str(foreign(tmp_path / "codes", codes)))
    data = CodeDataset(opened, SIZE, train=False, crop=False)
    assert data.drawn_codes(0)[0].tolist() == [0] * 64


def run_of(place: Path, name: str = NAME, **model: Any) -> RunConfig:
    phase = PhaseConfig(
        name="predictor", steps=2, batch_size=2, optimizer=OptimizerConfig(lr=1e-3), log_every=1
    )
    return RunConfig(
        family="next_patch",
        model=dataclasses.replace(golden().config, **model).to_dict(),
        data=DataConfig(source=str(place / name)),
        phases=(phase,),
        start_from=str(place / "checkpoint"),
    )


def test_a_run_learns_from_codes_alone(place: Path, tmp_path: Path) -> None:
    result = train(run_of(place), tmp_path / "run", device="cpu")
    assert result.finished
    run = run_of(place)
    tokenizer = dataclasses.replace(run.phases[0], name="tokenizer")
    with pytest.raises(ConfigError, match=r"phase tokenizer needs .* --vq-ckpt \(of next_patch\)"):
        train(dataclasses.replace(run, phases=(tokenizer,)), tmp_path / "other", device="cpu")


def objective(place: Path, system: NextPatchSystem) -> PredictorObjective:
    data = CodeDataset(open_codes(str(place)), SIZE, train=True, crop=False)
    return PredictorObjective(system, TrainingData(data), PredictorSettings())


def foreign(folder: Path, codes: Any, label: Any = 0) -> Path:
    """Return a folder of one picture, as other programs write it."""
    for name, values in ((CODES, codes), (LABELS, [label])):
        (folder / name).mkdir(parents=True)
        np.save(folder / name / "0.npy", np.array(values))
    return folder


def test_every_picture_has_the_codes_of_the_model(tmp_path: Path) -> None:
    folder = foreign(tmp_path / "codes", np.zeros((1, 10, 64), int))
    np.save(folder / CODES / "1.npy", np.zeros((1, 10, 16), int))
    np.save(folder / LABELS / "1.npy", np.array([0]))
    with pytest.raises(ConfigError, match=r"has 16 codes for picture 1, .* have 64"):
        objective(folder, golden()).dataset()[1]


def test_codes_out_of_range_name_the_file_they_came_from(place: Path, tmp_path: Path) -> None:
    for name in (NAME, f"{NAME}_105"):
        shutil.copytree(place / name, tmp_path / name)
    wrong = tmp_path / f"{NAME}_105" / CODES / "0.npy"
    np.save(wrong, np.full((1, 10, 64), 64))
    data = objective(tmp_path / NAME, golden()).dataset()

    def epochs() -> None:
        for epoch in range(40):
            data.set_epoch(epoch)
            data[0]

    with pytest.raises(DataError, match="codes from 64 to 64") as caught:
        epochs()
    assert str(caught.value).startswith(str(wrong))


def test_crops_are_a_whole_number_of_codes_wide(place: Path) -> None:
    result = CliRunner().invoke(main, command(place, "--image-size", "9"))
    assert result.exit_code == 2
    downsampling = golden().config.vq.downsampling
    expected = f"--image-size 9: a code of this tokenizer is {downsampling} px wide"
    assert expected in result.output


def test_closer_crops_are_of_the_same_tokenizer(place: Path, tmp_path: Path) -> None:
    for name in (NAME, f"{NAME}_105"):
        shutil.copytree(place / name, tmp_path / name)
    about = tmp_path / f"{NAME}_105" / "codes.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "tokenizer": "another"}))
    with pytest.raises(ConfigError, match=r"_105 has codes of another tokenizer"):
        objective(tmp_path / NAME, golden()).dataset()


def test_training_finds_the_closer_crops_of_any_range(place: Path) -> None:
    extract(place, "--output", str(place / "other"), "--crop-range", "1.2", "1.1")
    found = open_codes(str(place / "other"))
    assert isinstance(found.files[0], CodeFile)
    assert found.files[0].closer_folder == place / "other_105" / CODES


def test_a_crop_range_without_ten_crops_is_refused(place: Path) -> None:
    words = [word for word in command(place, "--flip") if word != "--ten-crop"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2
    assert "--crop-range is for --ten-crop" in result.output


def test_codes_of_crops_do_not_go_into_a_folder_with_the_name_of_a_file(place: Path) -> None:
    result = CliRunner().invoke(main, command(place, "--output", str(place / "z.safetensors")))
    assert result.exit_code == 2
    assert "--ten-crop and --flip write a folder of codes" in result.stderr
    assert not (place / "z.safetensors").exists()


def test_a_process_may_begin_while_another_writes(place: Path) -> None:
    (place / "begun").mkdir()
    (place / "begun" / ".codes.json.0123.partial").touch()
    assert "4 of 4 pictures" in extract(place, "--output", str(place / "begun"))


def test_codes_of_other_pictures_are_not_continued(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "pictures", tmp_path / "pictures")
    next((tmp_path / "pictures").rglob("*.png")).unlink()
    words = command(place)
    words[2] = str(tmp_path / "pictures")
    result = CliRunner().invoke(main, words)
    assert "or of other pictures; choose another --output" in result.output


def test_labels_are_read_once_and_again_after_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = foreign(tmp_path / "codes", np.zeros((1, 10, 64), int), 3)
    opened: list[str] = []

    def counted(path: Path) -> Any:
        opened.append(path.name)
        return read_npy(path)

    monkeypatch.setattr("nsp.data.codes.read_npy", counted)
    first = open_codes(str(folder))
    assert opened == ["0.npy"]
    assert open_codes(str(folder)).samples == first.samples
    assert opened == ["0.npy"]
    np.save(folder / LABELS / "0.npy", np.array([5], np.int16))
    assert [each.class_id for each in open_codes(str(folder)).samples] == [5]
    (folder / f"{LABELS}.npz").write_bytes(b"damaged")
    assert [each.class_id for each in open_codes(str(folder)).samples] == [5]
    (folder / LABELS / "0.npy").unlink()
    with pytest.raises(DataError, match=r"0\.npy is missing; extract the codes again"):
        open_codes(str(folder))


@pytest.mark.parametrize(
    ("codes", "label", "message"),
    [
        (np.zeros((1, 10, 64), int), 0, None),
        (np.zeros((1, 10, 16), int), 0, "has 16 codes for picture 0, .* have 64"),
        (np.full((1, 10, 64), 64), 0, "codes from 64 to 64, but the tokenizer has 64"),
        (np.zeros((1, 10, 64), int), 10, "classes 10 to 10"),
        (np.zeros((10, 64), int), 0, "codes are integers"),
        (np.zeros((1, 0, 64), int), 0, "at least one crop"),
        (np.zeros((1, 10, 64)), 0, "codes are integers"),
        (np.zeros((1, 10, 64), int), "cat", "number of one class"),
        (np.zeros((1, 10, 64), int), 10**15, "number of one class"),
    ],
)
def test_codes_that_do_not_fit_are_one_line(
    codes: Any, label: Any, message: str | None, tmp_path: Path
) -> None:
    def items() -> Any:
        return objective(foreign(tmp_path / "codes", codes, label), golden()).dataset()[0]

    if message is None:
        assert items()["tokens"].shape == (64,)
        return
    with pytest.raises((ConfigError, DataError), match=message) as caught:
        items()
    assert "\n" not in str(caught.value)


def test_codes_of_another_tokenizer_are_refused(place: Path) -> None:
    with pytest.raises(ConfigError, match="codes of another tokenizer"):
        objective(place / NAME, golden(l2_norm=False)).dataset()
    result = CliRunner().invoke(main, command(place, "--image-size", "64"))
    assert "of other crops or of other pictures; choose another" in result.output
