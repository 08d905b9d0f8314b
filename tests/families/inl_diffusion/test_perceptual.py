"""The autoencoder's perceptual loss: that of VGG16 if its weights are given, otherwise none."""

import dataclasses
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from nsp.data.dataset import ImageDataset
from nsp.data.sources import open_source
from nsp.errors import CheckpointError
from nsp.families.inl_diffusion.objective import VaeObjective, VaeSettings
from nsp.families.inl_diffusion.perceptual import VggDistance, read_vgg
from nsp.family.objective import TrainingData
from tests.families.inl_diffusion.test_objective import batch_of, new_system
from tests.training.pictures import write_pictures


@pytest.fixture(scope="module")
def vgg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The names and shapes of torchvision's vgg16 as far as they are used, and some more."""
    torch.manual_seed(0)
    state = {f"features.{n}": t for n, t in VggDistance().features.state_dict().items()}
    more = {"features.24.weight": torch.zeros(512, 512, 3, 3), "classifier.6.bias": torch.zeros(9)}
    file = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save({**state, **more}, file)
    return file


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    source = open_source(write_pictures(tmp_path_factory.mktemp("pictures")))
    return ImageDataset(source, 8, train=True, crop=False)


def test_the_distance_is_that_of_torchvisions_first_23_layers(vgg: Path) -> None:
    """The layers are written out here as torchvision numbers them; no package is needed."""
    state = torch.load(vgg, weights_only=True)
    convolutions = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21)
    distance = read_vgg(vgg)
    assert [i for i, m in enumerate(distance.features) if isinstance(m, nn.Conv2d)] == [
        *convolutions
    ]
    assert len(distance.features) == 23
    a, b = torch.rand(2, 2, 3, 16, 16) * 2 - 1
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])

    def seen(image: torch.Tensor) -> torch.Tensor:
        x = ((image + 1) / 2 - mean[:, None, None]) / std[:, None, None]
        for layer in convolutions:
            if layer in (5, 10, 17):
                x = nn.functional.max_pool2d(x, 2)
            weight, bias = (state[f"features.{layer}.{name}"] for name in ("weight", "bias"))
            x = nn.functional.conv2d(x, weight, bias, padding=1).relu()
        return x

    torch.testing.assert_close(distance(a, b), (seen(a) - seen(b)).square().mean())
    assert distance(a, a) == 0


def test_the_loss_is_the_public_sum_of_three(vgg: Path, pictures: ImageDataset) -> None:
    system, data = new_system(pictures), TrainingData(pictures)
    objective = VaeObjective(system, data, VaeSettings(vgg=str(vgg), kl_weight=0.5)).train()
    found = objective(batch_of(objective))
    wanted = found["reconstruction"] + 0.1 * found["perceptual"] + 0.5 * found["kl"]
    torch.testing.assert_close(found["loss"].detach(), wanted)
    found["loss"].backward()
    assert objective.distance is not None
    assert all(each.grad is None for each in objective.distance.parameters())
    assert system.vae.encoder.conv_in.weight.grad.abs().max() > 0


def test_without_weights_there_is_no_such_loss_and_the_log_says_so_once(
    pictures: ImageDataset, caplog: pytest.LogCaptureFixture
) -> None:
    objective = VaeObjective(new_system(pictures), TrainingData(pictures), VaeSettings())
    with caplog.at_level(logging.INFO):
        batch = batch_of(objective)
        assert "perceptual" not in objective.train()(batch)
    assert caplog.text.count("no perceptual loss") == 1


def test_a_folder_without_captions_trains_the_autoencoder(pictures: ImageDataset) -> None:
    bare = dataclasses.replace(
        pictures.source,
        samples=tuple(dataclasses.replace(each, captions=()) for each in pictures.source.samples),
    )
    data = TrainingData(ImageDataset(bare, 8, train=True, crop=False))
    objective = VaeObjective(new_system(pictures), data, VaeSettings())
    assert not objective.needs_captions
    assert objective.train()(batch_of(objective))["loss"].isfinite()


def test_a_file_that_is_not_vgg_is_refused_in_one_line(tmp_path: Path, vgg: Path) -> None:
    save_file({"conv.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="has no weights of VGG16"):
        read_vgg(tmp_path / "other.safetensors")
    state = torch.load(vgg, weights_only=True)
    torch.save({n: t for n, t in state.items() if n != "features.21.bias"}, tmp_path / "less.pth")
    with pytest.raises(CheckpointError, match=r"less\.pth.*21\.bias"):
        read_vgg(tmp_path / "less.pth")
    with pytest.raises(CheckpointError, match="does not exist"):
        read_vgg(tmp_path / "none.pth")
