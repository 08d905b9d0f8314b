from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from nsp.data.dataset import ImageDataset, to_model_range
from nsp.data.sources import ImageSource, open_source
from nsp.errors import ConfigError
from tests.data.picture_files import encoded, write_files


@pytest.fixture
def source(tmp_path: Path) -> ImageSource:
    files: dict[str, bytes | str] = {}
    for number, size in enumerate([(48, 32), (20, 40), (16, 16), (33, 17)]):
        files[f"{number}.png"] = encoded(".png", number, size)
        files[f"{number}.txt"] = f"picture {number}"
    return open_source(write_files(tmp_path, files))


def _epoch(dataset: ImageDataset, epoch: int) -> list[torch.Tensor]:
    dataset.set_epoch(epoch)
    return [dataset[index]["image"] for index in range(len(dataset))]


def _same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_items_have_the_promised_shape_and_fields(source: ImageSource) -> None:
    for crop in (False, True):
        item = ImageDataset(source, 16, train=True, crop=crop)[1]
        assert item["image"].dtype == torch.uint8
        assert item["image"].shape == (3, 16, 16)
        assert (item["caption"], item["class_id"], item["index"]) == ("picture 1", -1, 1)


def test_a_picture_of_the_asked_size_is_untouched(source: ImageSource) -> None:
    image_3HW = ImageDataset(source, 16, train=True, crop=False)[2]["image"]
    expected = np.asarray(source.load(2))
    assert np.array_equal(image_3HW.permute(1, 2, 0).numpy(), expected)


def test_an_epoch_repeats_exactly_and_differs_from_the_next(source: ImageSource) -> None:
    dataset = ImageDataset(source, 16, train=True, crop=True, flip=True, seed=3)
    first, second = _epoch(dataset, 0), _epoch(dataset, 1)
    assert not _same(first, second)
    resumed = ImageDataset(source, 16, train=True, crop=True, flip=True, seed=3)
    resumed.set_epoch(1)
    assert torch.equal(resumed[3]["image"], second[3])  # alone, as after a resume in mid-epoch
    assert _same(_epoch(resumed, 0), first)
    other_seed = ImageDataset(source, 16, train=True, crop=True, flip=True, seed=4)
    assert not _same(_epoch(other_seed, 0), first)


def test_pictures_of_one_epoch_are_cropped_independently(tmp_path: Path) -> None:
    picture = encoded(".png", size=(64, 64))
    twins = open_source(write_files(tmp_path, {f"c/{name}.png": picture for name in "abcdef"}))
    crops = _epoch(ImageDataset(twins, 32, train=True, crop=True), 0)
    assert len({crop.numpy().tobytes() for crop in crops}) > 1


def test_workers_see_the_epoch_and_give_the_same_pictures(source: ImageSource) -> None:
    dataset = ImageDataset(source, 16, train=True, crop=True, seed=1)
    loader = DataLoader(dataset, num_workers=1, persistent_workers=True, batch_size=4)
    for epoch in (0, 1):
        expected = torch.stack(_epoch(dataset, epoch))
        (batch,) = loader
        assert torch.equal(batch["image"], expected)
        assert batch["index"].tolist() == [0, 1, 2, 3]


def test_validation_crops_the_centre_in_every_epoch(source: ImageSource) -> None:
    dataset = ImageDataset(source, 16, train=False, crop=True, flip=True)
    assert _same(_epoch(dataset, 0), _epoch(dataset, 1))


def test_flip_off_never_mirrors_and_on_mirrors_about_half(source: ImageSource) -> None:
    plain = ImageDataset(source, 16, train=True, crop=False)
    flipping = ImageDataset(source, 16, train=True, crop=False, flip=True)
    reference = _epoch(plain, 0)
    assert _same(_epoch(plain, 9), reference)
    mirrored = 0
    for epoch in range(32):
        for image, original in zip(_epoch(flipping, epoch), reference, strict=True):
            changed = not torch.equal(image, original)
            mirrored += changed
            assert torch.equal(image, original.flip(-1) if changed else original)
    assert 40 < mirrored < 88  # 128 draws: mean 64, standard deviation 5.7


def test_the_cache_saves_reads_and_keeps_within_its_budget(source: ImageSource) -> None:
    reads: list[int] = []

    class Counting(ImageSource):
        def load(self, index: int):  # type: ignore[no-untyped-def]
            reads.append(index)
            return super().load(index)

    counting = Counting(source.samples, source.class_names, source.files)
    cached = ImageDataset(counting, 16, train=True, crop=True)
    expected = _epoch(cached, 0)
    _epoch(cached, 1)
    assert reads == [0, 1, 2, 3]
    reads.clear()
    tight = ImageDataset(counting, 16, train=True, crop=True, cache_bytes=0)
    assert _same(_epoch(tight, 0), expected)
    _epoch(tight, 1)
    assert len(reads) == 8


def test_model_range_ends_at_minus_one_and_one() -> None:
    ends = to_model_range(torch.tensor([0, 255], dtype=torch.uint8))
    assert ends.tolist() == [-1.0, 1.0]


def test_a_size_or_index_out_of_range_is_refused(source: ImageSource) -> None:
    with pytest.raises(ConfigError, match="image_size_px 0"):
        ImageDataset(source, 0, train=True, crop=False)
    with pytest.raises(IndexError, match=r"0\.\.3"):
        ImageDataset(source, 16, train=True, crop=False)[4]
