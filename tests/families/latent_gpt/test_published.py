"""Weights of a VQGAN under taming-transformers' names become our image tokenizer."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from nsp.artifacts.checkpoint import read_checkpoint
from nsp.cli import main
from nsp.errors import CheckpointError, ConfigError
from nsp.families.latent_gpt.learn import convert
from nsp.families.latent_gpt.published import read_vq
from nsp.raster.vq import VqTokenizer
from nsp.raster.vq_config import VqConfig

Change: TypeAlias = Callable[[Tensor], Tensor]

CONFIG = VqConfig(
    codebook_size=32,
    codebook_width=8,
    is_normalised=False,
    latent_channels=16,
    base_channels=32,
    channel_multipliers=(1, 1, 2),
    num_res_blocks=1,
)


@pytest.fixture
def vq() -> VqTokenizer:
    torch.manual_seed(0)
    return VqTokenizer(CONFIG).eval()


def their_state(vq: VqTokenizer) -> dict[str, Tensor]:
    """Return the weights by their names, with parts that only their training has."""
    found = {"loss.discriminator.main.0.weight": torch.zeros(3)}
    for name, tensor in vq.state_dict().items():
        if ".qkv." in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                found[name.replace(".qkv.", f".{letter}.")] = part.clone()
        elif not name.startswith("quantize.usage"):
            found[name] = tensor
    return found


@pytest.mark.parametrize("wrap", ["plain", "state_dict", "prefix"])
@torch.no_grad()
def test_pictures_decoded_from_codes_are_the_same(
    wrap: str, vq: VqTokenizer, tmp_path: Path
) -> None:
    state = their_state(vq)
    content = {
        "plain": state,
        "state_dict": {"state_dict": state, "epoch": 3},
        "prefix": {"model": {f"module.{name}": tensor for name, tensor in state.items()}},
    }[wrap]
    torch.save(content, tmp_path / "last.ckpt")
    loaded = read_vq(tmp_path / "last.ckpt")
    assert loaded.config == CONFIG
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(loaded.tokenize(image), vq.tokenize(image))
    assert torch.equal(loaded.rebuilt(image), vq.rebuilt(image))


def test_an_attention_of_three_projections_is_theirs(vq: VqTokenizer) -> None:
    names = set(their_state(vq))
    assert {"encoder.mid.attn_1.q.weight", "decoder.up.2.attn.0.proj_out.bias"} <= names
    assert not any(re.search("qkv", name) for name in names)


def test_a_converted_folder_is_a_model_to_train(
    vq: VqTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(their_state(vq), tmp_path / "last.ckpt")
    (tmp_path / "config.json").write_text('{"size": "tiny"}')
    words = ("--tokenizer", "last.ckpt", "--config", "config.json", "--output-dir", "model")
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["convert", "--family", "latent_gpt", *words])
    assert result.exit_code == 0, result.output
    made = read_checkpoint(tmp_path / "model").load()
    assert made.config.vq == CONFIG
    assert made.config.text is None
    assert torch.equal(made.vq.decoder.conv_in.weight, vq.decoder.conv_in.weight)
    with pytest.raises(ConfigError, match="unknown key 'sise'"):
        convert(tmp_path / "last.ckpt", {"sise": "tiny"}, tmp_path / "other")


def test_what_does_not_fit_is_named(vq: VqTokenizer, tmp_path: Path) -> None:
    for state, message in (
        ({"text_model.embeddings.token_embedding.weight": torch.zeros(3, 3)}, "CLIP text encoder"),
        ({n: t for n, t in their_state(vq).items() if ".mid.attn_1.k." not in n}, r"attn_1\.k\."),
        ({n: t for n, t in their_state(vq).items() if "norm_out" not in n}, "norm_out"),
    ):
        torch.save(state, tmp_path / "last.ckpt")
        with pytest.raises(CheckpointError, match=message):
            read_vq(tmp_path / "last.ckpt")


@pytest.mark.parametrize(
    "change",
    [lambda t: t[0, 0, 0, 0], lambda t: t[..., None], lambda t: t[:, 1:], lambda t: t.long()],
    ids=["no axis", "five axes", "narrow", "integers"],
)
def test_a_projection_unlike_its_neighbours_is_named(
    change: Change, vq: VqTokenizer, tmp_path: Path
) -> None:
    state = their_state(vq)
    state["encoder.mid.attn_1.k.weight"] = change(state["encoder.mid.attn_1.k.weight"])
    torch.save(state, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"last\.ckpt: tensor encoder\.mid\.attn_1\.k\.w"):
        read_vq(tmp_path / "last.ckpt")


def test_sizes_that_no_tokenizer_has_name_the_file(vq: VqTokenizer, tmp_path: Path) -> None:
    state = their_state(vq)
    state["encoder.conv_in.weight"] = torch.zeros(9, 3, 3, 3)
    torch.save(state, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"last\.ckpt has impossible sizes: vq: base_chann"):
        read_vq(tmp_path / "last.ckpt")


@pytest.mark.parametrize("content", ["notes.txt", "config.json"])
def test_a_folder_of_other_things_is_not_replaced(
    content: str, vq: VqTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(their_state(vq), tmp_path / "last.ckpt")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / content).write_text('{"model_type": "t5"}')
    monkeypatch.chdir(tmp_path)
    words = ("--family", "latent_gpt", "--tokenizer", "last.ckpt", "--output-dir", "mine")
    result = CliRunner().invoke(main, ["convert", *words])
    assert result.exit_code == 2
    assert "mine is not empty and not a checkpoint" in result.output
    assert (tmp_path / "mine" / content).exists()
