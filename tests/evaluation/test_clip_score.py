"""The CLIP score is that of transformers' own logits, from the files that generating leaves."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from nsp.cli import main
from nsp.data.image_files import write_picture
from nsp.errors import CheckpointError, ConfigError, DataError
from nsp.evaluation.captioned_pictures import open_captioned
from nsp.evaluation.clip import Clip, load_clip
from nsp.evaluation.clip_score import clip_score
from nsp.text.encoder import import_transformers, save_text_encoder
from nsp.text.tokenizer import train_tokenizer
from tests.models import CAPTIONS

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CLIP with random weights, as transformers writes it."""
    transformers = import_transformers()
    folder = tmp_path_factory.mktemp("clip") / "clip"
    tokenizer = train_tokenizer(list(CAPTIONS), vocab_size=560, max_tokens=16)
    half = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": 8,
    }
    text = {
        **half,
        "vocab_size": tokenizer.vocab_size,
        "max_position_embeddings": 16,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }
    vision = {**half, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    model = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        model.logit_scale.fill_(0.0)
    save_text_encoder(model, folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def clip(clip_folder: Path) -> Clip:
    return load_clip(clip_folder, CPU)


def picture(seed: int, width: int = 40, height: int = 50) -> Image.Image:
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures as `nsp generate` writes them, with their contact sheet."""
    for number, caption in enumerate(CAPTIONS):
        pixels = np.asarray(picture(number))
        write_picture(tmp_path / f"{number:03d}.png", pixels, {"prompt": caption, "seed": "0"})
    write_picture(tmp_path / "contact_sheet.png", np.zeros((9, 9, 3), np.uint8))
    return tmp_path


def logits(clip_folder: Path) -> torch.Tensor:
    """Return what transformers computes of each picture and its caption, with its own processor."""
    transformers = import_transformers()
    model = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    images = [picture(number) for number in range(len(CAPTIONS))]
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    tokenizer = load_clip(clip_folder, CPU).tokenizer.tokenize(list(CAPTIONS))
    with torch.no_grad():
        found = model(
            input_ids=torch.from_numpy(tokenizer.token_ids),
            attention_mask=torch.from_numpy(tokenizer.mask),
            pixel_values=pixels,
        )
    diagonal: torch.Tensor = found.logits_per_image.diagonal()  # its scale is exp(0)
    return diagonal


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_the_score_is_the_mean_of_transformers_logits(
    clip_folder: Path, clip: Clip, folder: Path, batch_size: int
) -> None:
    cosines = logits(clip_folder)
    assert cosines.min() < 0 < cosines.max(), "nothing is bounded"
    found = clip_score(open_captioned(folder, None), clip, batch_size=batch_size)
    assert found.num_pictures == len(CAPTIONS)
    expected = 100 * cosines.clamp_min(0).mean().item()
    assert found.clip_score == pytest.approx(expected, abs=1e-4)


def test_an_archive_with_a_file_of_captions_has_the_score_of_the_folder(
    clip: Clip, folder: Path
) -> None:
    expected = clip_score(open_captioned(folder, None), clip)
    pictures = np.stack([np.asarray(picture(number)) for number in range(len(CAPTIONS))])
    np.savez(folder / "images.npz", pictures)
    lines = folder / "captions.list"
    lines.write_text("\n".join(CAPTIONS) + "\n")
    assert clip_score(open_captioned(folder / "images.npz", lines), clip) == expected
    for file in folder.glob("*.png"):  # captions are given, or lie beside pictures
        Image.open(file).save(file)
    assert clip_score(open_captioned(folder, lines), clip) == expected
    for number, caption in enumerate(CAPTIONS):
        (folder / f"{number:03d}.txt").write_text(caption)
    assert clip_score(open_captioned(folder, None), clip) == expected


def test_colours_are_normalised_as_the_folder_says(clip_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "clip"
    other.mkdir()
    for file in clip_folder.iterdir():
        (other / file.name).symlink_to(file)
    numbers = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    (other / "preprocessor_config.json").write_text(json.dumps(numbers))
    white = Image.new("RGB", (32, 32), (255, 255, 255))
    assert np.allclose(load_clip(other, CPU).pixels(white), 2)
    (other / "preprocessor_config.json").write_text('{"image_mean": "grey"}')
    with pytest.raises(CheckpointError, match="image_mean must be three numbers"):
        load_clip(other, CPU)


def nsp(*words: object) -> Result:
    return CliRunner().invoke(main, ["clip-score", *(str(word) for word in words)])


def test_the_verb_says_the_score_its_definition_and_by_which_clip(
    clip_folder: Path, clip: Clip, folder: Path
) -> None:
    score = clip_score(open_captioned(folder, None), clip).clip_score
    done = nsp(folder, "--clip", clip_folder)
    assert done.exit_code == 0, done.output
    assert done.stdout == (
        f"CLIP score {score:.2f}, mean of 100 max(cos, 0) of {len(CAPTIONS)} pictures, "
        f"by {clip_folder}\n"
    )
    values = json.loads(nsp(folder, "--clip", clip_folder, "--json").stdout)
    assert values["clip_score"] == pytest.approx(score)
    assert values["num_pictures"] == len(CAPTIONS)


def test_without_a_clip_there_is_one_line_that_says_what_it_is(folder: Path) -> None:
    done = nsp(folder)
    assert done.exit_code == 2
    assert "no CLIP score without a CLIP: give its folder" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_folder_that_is_no_whole_clip_is_one_line(clip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load_clip(tmp_path / "none", CPU)
    config = json.loads((clip_folder / "config.json").read_text())
    for change, message in (
        ({"model_type": "t5"}, "has a model of type 't5'"),
        ({"vision_config": None}, "text_config and vision_config are needed"),
        ({"projection_dim": 10**9}, "projection_dim"),
        ({"projection_dim": 9}, "wrong shape"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            (tmp_path / name).unlink(missing_ok=True)
            (tmp_path / name).symlink_to(clip_folder / name)
        with pytest.raises(CheckpointError, match=message) as caught:
            load_clip(tmp_path, CPU)
        assert "\n" not in str(caught.value)


def test_pictures_without_captions_are_one_line(clip: Clip, folder: Path) -> None:
    pictures = np.zeros((2, 8, 8, 3), np.uint8)
    np.savez(folder / "images.npz", pictures)
    with pytest.raises(ConfigError, match="has no captions: give one per line with --captions"):
        open_captioned(folder / "images.npz", None)
    lines = folder / "captions"
    lines.write_text("one\n")
    with pytest.raises(DataError, match="has 1 lines for 2 pictures"):
        open_captioned(folder / "images.npz", lines)
    lines.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="captions: its caption is not UTF-8"):
        open_captioned(folder / "images.npz", lines)
    write_picture(folder / "bare.png", pictures[0])
    with pytest.raises(DataError, match=r"bare\.png has no caption: nsp generate keeps its prompt"):
        clip_score(open_captioned(folder, None), clip)
    (folder / "bare.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"bare\.png: "):
        clip_score(open_captioned(folder, None), clip)
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match="empty has no pictures"):
        open_captioned(folder / "empty", None)
