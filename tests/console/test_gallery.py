import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nsp.console.gallery import generate_gallery
from nsp.data.image_files import read_metadata
from nsp.errors import ConfigError
from nsp.pipeline.orders import make_orders
from nsp.pipeline.pipeline import load_pipeline

PROMPTS = ("red apple", "green apple", "smiling cat")


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint):
    return load_pipeline(tiny_checkpoint)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def make(pipeline, folder, *, batch_size=4, seed=3, prompts=PROMPTS, num_images=1, **options):
    own = ("save_intermediates", "on_step", "kind", "sheet")
    shown = {name: options.pop(name) for name in own if name in options}
    settings = pipeline.sampling.changed(options)
    orders = make_orders(settings, prompts=prompts, seed=seed, num_images=num_images)
    return generate_gallery(pipeline, orders, folder, batch_size=batch_size, **shown)


@pytest.mark.parametrize("more_smooth", [False, True])
def test_images_do_not_depend_on_the_batch_size(pipeline, tmp_path, more_smooth):
    runs = [
        make(pipeline, tmp_path / str(n), batch_size=n, num_images=2, more_smooth=more_smooth)
        for n in (1, 4, 6)
    ]
    for images in zip(*(run.images for run in runs), strict=True):
        first, *others = (pixels(image.path).astype(int) for image in images)
        # Another batch size may round another way, by less than one grey level.
        assert all(np.abs(first - other).max() <= 1 for other in others)


def test_an_image_is_made_again_alone_from_its_metadata(pipeline, tmp_path):
    gallery = make(pipeline, tmp_path, num_images=2, top_p=0.9)
    for image in gallery.images:
        found = read_metadata(image.path)
        again = pipeline.generate(
            prompts=[found["prompt"]], seed=int(found["seed"]), **json.loads(found["sampling"])
        )
        assert np.abs(again.images[0].astype(int) - pixels(image.path)).max() <= 1


def test_metadata_names_model_backend_and_every_setting(pipeline, tmp_path):
    gallery = make(pipeline, tmp_path, guidance_scale=3.5, guidance_schedule="constant")
    found = read_metadata(gallery.images[0].path)
    assert found["model"] == pipeline.model_hash != ""
    assert (found["family"], found["backend"]) == ("var", "torch")
    settings = {**pipeline.sampling.to_dict(), "guidance_scale": 3.5}
    assert json.loads(found["sampling"]) == {**settings, "guidance_schedule": "constant"}


def test_images_of_different_prompts_and_seeds_differ(pipeline, tmp_path):
    gallery = make(pipeline, tmp_path, num_images=2)
    assert len({pixels(image.path).tobytes() for image in gallery.images}) == len(gallery.images)


def test_intermediates_end_with_the_image(pipeline, tmp_path):
    gallery = make(pipeline, tmp_path, save_intermediates=True)
    count = pipeline.config.num_scales
    assert len(list((tmp_path / "scales").iterdir())) == count * len(PROMPTS)
    for image in gallery.images:
        scales = [
            pixels(tmp_path / "scales" / f"{image.path.stem}_scale{n + 1}.png")
            for n in range(count)
        ]
        assert np.array_equal(scales[-1], pixels(image.path))
        assert not np.array_equal(scales[0], scales[-1])


def test_progress_ends_at_the_last_scale_of_every_batch(pipeline, tmp_path):
    seen = []
    make(pipeline, tmp_path, batch_size=2, on_step=seen.append)
    count = pipeline.config.num_scales
    assert [(p.images_done, p.batch, p.scale) for p in seen] == [
        *((0, 2, n + 1) for n in range(count)),
        *((2, 1, n + 1) for n in range(count)),
    ]


def test_a_bad_condition_at_the_end_is_found_before_anything_is_written(
    tiny_class_checkpoint, tmp_path
):
    pipeline = load_pipeline(tiny_class_checkpoint)
    planned = make_orders(pipeline.sampling, class_ids=[1, 2, 999])
    with pytest.raises(ConfigError, match="class id 999"):
        generate_gallery(pipeline, planned, tmp_path / "out", batch_size=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("002_smiling-cat_seed3.png", "png"),
        ("contact_sheet.png", "png"),
        ("images.npz", "npz"),
    ],
)
def test_a_folder_in_the_place_of_a_file_is_found_before_the_first_step(
    pipeline, tmp_path, name, kind
):
    (tmp_path / name).mkdir()
    steps = []
    with pytest.raises(IsADirectoryError, match=f"is a folder, but .*{name}"):
        make(pipeline, tmp_path, kind=kind, on_step=steps.append)
    assert not steps
    assert [path.name for path in tmp_path.iterdir()] == [name]


def huge_png(path: Path) -> None:
    """A file of 60 bytes that promises 900 million pixels."""
    size = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        for kind, content in ((b"IHDR", size), (b"IDAT", zlib.compress(b"0")), (b"IEND", b"")):
            checksum = zlib.crc32(kind + content)
            file.write(struct.pack(">I", len(content)) + kind + content)
            file.write(struct.pack(">I", checksum))


def sparse_file(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(10 << 30)


@pytest.mark.parametrize("kind", ["png", "webp"])
@pytest.mark.parametrize("write", [huge_png, sparse_file, os.mkfifo])
def test_a_file_that_is_not_one_of_ours_is_replaced_and_not_decoded(
    pipeline, tmp_path, kind, write
):
    path = tmp_path / f"000_red-apple_seed3.{kind}"
    write(path)
    (image,) = make(pipeline, tmp_path, prompts=PROMPTS[:1], kind=kind, sheet=False).images
    assert image.path == path
    assert image.ms is not None
    assert read_metadata(path)["prompt"] == "red apple"


def test_what_is_there_with_the_same_settings_is_not_made_again(pipeline, tmp_path):
    first = make(pipeline, tmp_path, batch_size=1)
    before = {image.path: image.path.stat().st_mtime_ns for image in first.images}
    first.images[1].path.write_bytes(first.images[1].path.read_bytes()[:-40])  # a torn file
    steps = []
    again = make(pipeline, tmp_path, batch_size=1, on_step=steps.append)
    assert [image.ms is None for image in again.images] == [True, False, True]
    assert {step.images_done for step in steps} == {2}
    kept = [image.path for image in (again.images[0], again.images[2])]
    assert all(path.stat().st_mtime_ns == before[path] for path in kept)
    sheet = pixels(again.contact_sheet)
    assert np.array_equal(
        sheet, pixels(make(pipeline, tmp_path / "new", batch_size=1).contact_sheet)
    )
    other = make(pipeline, tmp_path, batch_size=1, temperature=0.5)
    assert all(image.ms is not None for image in other.images)


@pytest.mark.parametrize("kind", ["webp", "jpeg"])
def test_other_formats_are_found_again_and_a_sheet_may_be_left_out(pipeline, tmp_path, kind):
    made = make(pipeline, tmp_path, kind=kind, sheet=False)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [f".{kind}"] * 3
    assert made.contact_sheet is None
    assert all(image.ms is None for image in make(pipeline, tmp_path, kind=kind).images)


def test_an_archive_has_all_pictures_in_order_with_their_metadata(pipeline, tmp_path):
    made = make(pipeline, tmp_path, kind="npz", sheet=False, batch_size=2)
    assert [path.name for path in tmp_path.iterdir()] == ["images.npz"]
    with np.load(tmp_path / "images.npz") as archive:
        pictures, metadata = archive["arr_0"], archive["metadata"]
    files = make(pipeline, tmp_path / "files", batch_size=2).images
    assert np.array_equal(pictures, np.stack([pixels(image.path) for image in files]))
    assert [json.loads(text)["prompt"] for text in metadata] == list(PROMPTS)
    assert {image.path for image in made.images} == {tmp_path / "images.npz"}
