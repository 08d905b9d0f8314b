"""Several captions of a picture are drawn exactly; sets without any train what needs none."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from nsp.artifacts.checkpoint import read_checkpoint
from nsp.data.dataset import ImageDataset
from nsp.data.pack import pack
from nsp.data.sources import open_source
from nsp.errors import ConfigError
from nsp.family.recipe import RunConfig
from nsp.training.data_order import Share
from nsp.training.loading import training_loader
from nsp.training.tokens import TokenDataset
from nsp.training.whole_run import train
from tests.data.picture_files import encoded, write_files
from tests.models import new_tiny_checkpoint


def _several(root: Path) -> Path:
    rows = [
        json.dumps({"file_name": f"{n}.png", "text": [f"thing {n}", f"one {n}", f"some {n}"]})
        for n in range(6)
    ]
    files = {f"{n}.png": encoded(".png", n, (16, 16)) for n in range(6)}
    return write_files(root, {**files, "metadata.jsonl": "\n".join(rows)})


def _captions(data: ImageDataset, epoch: int) -> list[str]:
    data.set_epoch(epoch)
    return [data[index]["caption"] for index in range(len(data))]


def test_every_epoch_draws_a_caption_of_each_picture_from_its_own_numbers(tmp_path: Path) -> None:
    source = open_source(_several(tmp_path))
    data = ImageDataset(source, 16, train=True, crop=False, seed=3)
    epochs = [_captions(data, epoch) for epoch in range(24)]
    assert epochs[0] != epochs[1]
    for number, sample in enumerate(source.samples):
        assert {epoch[number] for epoch in epochs} == set(sample.captions)
    resumed = ImageDataset(source, 16, train=True, crop=False, seed=3)
    resumed.set_epoch(5)
    assert resumed[4]["caption"] == epochs[5][4]  # alone, as after a resumption
    still = ImageDataset(source, 16, train=False, crop=False, seed=3)
    assert _captions(still, 7) == [sample.caption for sample in source.samples]


def test_the_text_model_sees_the_caption_that_the_epoch_drew(tmp_path: Path) -> None:
    system = read_checkpoint(new_tiny_checkpoint(tmp_path / "model")).load()
    side = system.config.image_size_px
    data = ImageDataset(open_source(_several(tmp_path / "set")), side, train=True, crop=True)
    tokens = TokenDataset(data, system.tokenizing(), system.encode_prompts)
    for epoch in (0, 3):
        tokens.set_epoch(epoch)
        expected = system.encode_prompts(_captions(data, epoch))
        found = torch.stack([tokens[index]["condition"] for index in range(len(tokens))])
        assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_worker_that_reads_ahead_draws_for_its_own_epoch(tmp_path: Path) -> None:
    data = ImageDataset(open_source(_several(tmp_path)), 16, train=True, crop=False)
    loaders = [
        training_loader(
            data, Share(batch_size=3), start=0, stop=12, seed=0, num_workers=n, pin_memory=False
        )
        for n in (0, 2)
    ]
    alone, ahead = ([batch["caption"] for batch in loader] for loader in loaders)
    assert alone == ahead
    data.set_epoch(1)
    list(loaders[1])
    assert int(data._epoch) == 1  # not moved by workers


def test_packed_captions_are_drawn_from_streams_and_listed_again(tmp_path: Path) -> None:
    from nsp.data.stream import ShardStream

    pack(_several(tmp_path / "set"), tmp_path / "packed")
    expected = {sample.captions for sample in open_source(tmp_path / "set").samples}
    assert {sample.captions for sample in open_source(tmp_path / "packed").samples} == expected
    stream = ShardStream(tmp_path / "packed", 16, batch_size=6, train=True, crop=False)
    seen = [item["caption"] for item, _ in zip(iter(stream), range(60), strict=False)]
    assert set(seen) == {caption for captions in expected for caption in captions}
    again = ShardStream(tmp_path / "packed", 16, batch_size=6, train=True, crop=False, start_step=3)
    assert next(iter(again))["caption"] == seen[18]


def test_a_set_without_captions_trains_the_tokenizer_and_is_refused_where_they_are_read(
    config: RunConfig, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bare = shutil.copytree(pictures, tmp_path / "bare", ignore=shutil.ignore_patterns("*.txt"))
    run = dataclasses.replace(config, data=dataclasses.replace(config.data, source=str(bare)))
    with pytest.raises(ConfigError, match="phase predictor needs captions, but the pictures"):
        train(run, tmp_path / "run")
    assert not (tmp_path / "run/run.json").exists()
    assert train(run, tmp_path / "run", last_phase="tokenizer").finished
    assert "prompt tokenizer knows only single letters" in caplog.text
    with pytest.raises(ConfigError, match="phase predictor needs captions"):
        train(run, tmp_path / "run", resume=True)


def test_an_unconditional_model_needs_neither_captions_nor_classes(tmp_path: Path) -> None:
    model = json.loads((new_tiny_checkpoint(tmp_path / "model") / "config.json").read_text())
    from nsp.families.var.config import VarConfig, with_condition
    from nsp.families.var.system import VarSystem
    from nsp.family.classes import ClassCondition

    config = VarConfig.from_dict(model["config"])
    files = {f"{n}.png": encoded(".png", n, (16, 16)) for n in range(3)}
    source = open_source(write_files(tmp_path / "set", dict(files)))
    for num_classes in (1, 2):
        system = VarSystem(with_condition(config, ClassCondition(num_classes=num_classes)))
        data = ImageDataset(source, config.image_size_px, train=True, crop=True)
        if num_classes == 1:
            assert int(TokenDataset(data, system.tokenizing(), 1)[0]["condition"]) == 0
        else:
            with pytest.raises(ConfigError, match="has neither classes nor captions"):
                TokenDataset(data, system.tokenizing(), num_classes)
