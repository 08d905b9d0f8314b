"""What a run trains on: streams, token caches, and never what is held out."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nsp.artifacts.checkpoint import read_checkpoint, write_digests
from nsp.data.dataset import ImageDataset
from nsp.data.pack import pack
from nsp.data.sources import open_source, survey
from nsp.errors import ConfigError, DataError
from nsp.family.objective import TokenCache
from nsp.family.recipe import RunConfig
from nsp.family.recipes import preset
from nsp.family.registry import family
from nsp.training.tokens import cached_tokens, tokenize
from nsp.training.whole_run import train


@pytest.fixture(scope="module")
def plain(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = preset("smoke")
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, source=str(pictures)))
    folder = tmp_path_factory.mktemp("plain") / "run"
    train(run, folder)
    return folder


@pytest.fixture
def streamed(config: RunConfig, pictures: Path, plain: Path, tmp_path: Path) -> RunConfig:
    """A run on the pictures packed into shards."""
    pack(str(pictures), tmp_path / "shards", samples_per_shard=3)
    data = dataclasses.replace(config.data, source=str(tmp_path / "shards"), stream=True)
    return dataclasses.replace(config, data=data, start_from=str(plain / "start"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted((folder / "checkpoint").glob("*/model.safetensors"))
    return {f"{f.parent.name}/{k}": v for f in files for k, v in load_file(f).items()}


def test_a_streamed_run_resumes_exactly(streamed: RunConfig, tmp_path: Path) -> None:
    train(streamed, tmp_path / "whole")
    for phase, last in (("tokenizer", 4), ("predictor", 4)):
        train(streamed, tmp_path / "parts", last_phase=phase, resume=phase == "predictor")
        _forget(tmp_path / "parts", phase, last)
        train(streamed, tmp_path / "parts", last_phase=phase, resume=True)
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (tmp_path / "whole/predictor/samples/step000004.png").is_file()


def _forget(folder: Path, phase: str, step: int) -> None:
    """Make a run look as if it had been killed just before `step`."""
    newest = folder / phase / f"checkpoints/step{step:08d}"
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    config = folder / "checkpoint/config.json"
    record = json.loads(config.read_text())
    record["notes"]["steps"][phase] = step - 1
    config.write_text(json.dumps(record))
    write_digests(folder / "checkpoint")


def test_a_stream_needs_a_prompt_tokenizer_from_elsewhere(
    streamed: RunConfig, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="--start-from"):
        train(dataclasses.replace(streamed, start_from=None), tmp_path / "run")


def emoji_pictures(plain: Path, split: str) -> tuple[ImageDataset, torch.nn.Module]:
    system = read_checkpoint(plain / "checkpoint").load()
    found = survey("emoji").choose("heldout") if split == "heldout" else open_source("emoji")
    return ImageDataset(found, 16, train=True, crop=False), system


def test_cached_tokens_are_those_of_the_tokenizer_and_follow_its_weights(
    plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, system = emoji_pictures(plain, "heldout")
    cache, vae = tmp_path / "tokens.safetensors", system.vae
    family("var").learner.write_cache(system, data, cache)
    written = cache.stat().st_mtime_ns
    made = system.tokenizing()
    expected = tokenize(made, data)
    given, own = TokenCache(cache, is_given=True), TokenCache(cache)
    assert torch.equal(cached_tokens(made, data, given), expected)
    assert cache.stat().st_mtime_ns == written
    with torch.no_grad():
        vae.decoder.conv_in.weight.mul_(-1)
    assert torch.equal(cached_tokens(made, data, given), expected)  # a decoder makes no tokens
    with torch.no_grad():
        vae.encoder.conv_in.weight.mul_(-1)
    with pytest.raises(
        ConfigError, match="was made with another tokenizer or other pictures; make it"
    ):
        cached_tokens(made, data, given)
    assert cache.stat().st_mtime_ns == written  # what the user gave is never written
    assert not torch.equal(cached_tokens(made, data, own), expected)
    assert "was made with another tokenizer or other pictures; making it again" in caplog.text
    cache.write_bytes(b"x")
    with pytest.raises(DataError, match=r"is text .* and is damaged; delete it"):
        cached_tokens(made, data, own)
    with pytest.raises(ConfigError, match="does not exist; make it with nsp data cache"):
        cached_tokens(made, data, TokenCache(tmp_path / "typo", is_given=True))


def test_crops_cannot_be_cached(plain: Path, pictures: Path, tmp_path: Path) -> None:
    system = read_checkpoint(plain / "checkpoint").load()
    data = ImageDataset(open_source(pictures), 16, train=True, crop=True)
    with pytest.raises(ConfigError, match="only whole pictures can be cached"):
        family("var").learner.write_cache(system, data, tmp_path / "tokens.safetensors")


def test_held_out_captions_in_the_data_stop_the_run_before_it_starts(
    config: RunConfig, tmp_path: Path
) -> None:
    listed = tmp_path / "held.tsv"
    listed.write_text("name\tcaption\nelsewhere\tColour  number 3\n")
    data = dataclasses.replace(config.data, heldout=str(listed))
    with pytest.raises(ConfigError, match=r"1 pictures to train on are held out by .*number 3"):
        train(dataclasses.replace(config, data=data), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_held_out_split_is_validated_on(tmp_path: Path) -> None:
    run = preset("smoke")
    phases = tuple(dataclasses.replace(phase, validate_every=2) for phase in run.phases[:1])
    train(dataclasses.replace(run, phases=phases), tmp_path / "run")
    lines = (tmp_path / "run/tokenizer/log.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    validated = [row["held_out_loss"] for row in rows if "held_out_loss" in row]
    assert len(validated) == 2
    about = tmp_path / "run/tokenizer/checkpoints/step00000004/about.json"
    assert json.loads(about.read_text())["loss"] == validated[-1]
