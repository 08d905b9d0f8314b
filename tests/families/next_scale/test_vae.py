"""What the autoencoder promises: diffusers' pictures, folders read, a decoder that fits float16."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from nsp.errors import CheckpointError, NspError
from nsp.families.next_scale.config import SDXL_VAE, SIZES
from nsp.families.next_scale.stages import stages
from nsp.families.next_scale.vae import (
    Vae,
    decode,
    largest_activation,
    load_vae,
    new_autoencoder,
    rescale_decoder,
    scale_for_half,
)

CONFIG = SIZES["tiny"].vae
LATENTS = torch.randn(1, 4, 6, 5, generator=torch.Generator().manual_seed(0))


def _loud_autoencoder(gain: float) -> nn.Module:
    """Return an autoencoder whose decoder's activations are `gain` times the usual."""
    torch.manual_seed(0)
    model = new_autoencoder(CONFIG)
    rescale_decoder(model, 1)
    with torch.no_grad():
        for name, parameter in model.decoder.named_parameters():
            if ".conv1." in name or ".conv2." in name or "to_out" in name:
                parameter.mul_(gain)
    return model.eval()


@torch.no_grad()
def test_decoding_is_diffusers_decoding() -> None:
    model = new_autoencoder(CONFIG)
    expected = model.decode(LATENTS).sample
    torch.testing.assert_close(decode(model, LATENTS), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_rescaling_leaves_every_bit_of_the_picture() -> None:
    model = _loud_autoencoder(1e5)
    before, loud = decode(model, LATENTS), largest_activation(model, LATENTS)
    scale = scale_for_half(loud)
    assert scale > 1
    rescale_decoder(model, scale)
    assert torch.equal(decode(model, LATENTS), before)
    assert largest_activation(model, LATENTS) < 65504 / 4


@torch.no_grad()
def test_a_decoder_that_leaves_float16_fits_it_after_rescaling() -> None:
    from nsp.export.graph.narrow import at_precision

    def narrowed(model: nn.Module) -> torch.Tensor:
        system = nn.ModuleDict({"vae": nn.ModuleDict({"autoencoder": model})})
        half = at_precision(
            system, {"decoder": stages(SIZES["tiny"], "delta", "float32")["decoder"]}, "fp16"
        )
        return decode(half["vae"]["autoencoder"], LATENTS)

    model = _loud_autoencoder(1e6)
    expected = decode(model, LATENTS)
    assert not torch.isfinite(narrowed(model)).all()  # the known overflow
    rescale_decoder(model, scale_for_half(largest_activation(model, LATENTS)))
    error = (narrowed(model) - expected).square().mean() / torch.var(expected)
    assert error < 1e-4


def test_a_diffusers_folder_is_read_with_its_scaling_factor(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = new_autoencoder(dataclasses.replace(CONFIG, scaling_factor=0.13025))
    model.save_pretrained(tmp_path / "vae")
    vae, config = load_vae(tmp_path)
    assert (config.scaling_factor, config.downsampling) == (0.13025, 2)
    image = torch.rand(1, 3, 12, 12) * 2 - 1
    with torch.no_grad():
        expected = model.encode(image).latent_dist.mode() * 0.13025
        torch.testing.assert_close(vae.encode(image), expected)
        torch.testing.assert_close(
            vae.decode(expected), model.decode(expected / 0.13025).sample, rtol=1e-4, atol=1e-5
        )


def test_folders_with_the_old_names_of_attention_are_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = new_autoencoder(CONFIG)
    model.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(path)
    for new, name in old.items():
        state = {n.replace(f".{new}.", f".{name}."): tensor for n, tensor in state.items()}
    assert state.keys() != model.state_dict().keys()
    path.unlink()
    save_file(state, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    vae, _ = load_vae(tmp_path)
    with torch.no_grad():
        found = vae.decode(LATENTS)
        torch.testing.assert_close(found, model.decode(LATENTS).sample, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "how",
    [{}, {"max_shard_size": "20KB"}, {"variant": "non_ema"}, {"variant": "fp16"},
     {"variant": "fp16", "max_shard_size": "20KB"}],
)  # fmt: skip
def test_folders_as_the_hub_has_them_are_read(tmp_path: Path, how: dict[str, str]) -> None:
    torch.manual_seed(0)
    model = new_autoencoder(CONFIG)
    model.save_pretrained(tmp_path, **how)
    with torch.no_grad():
        found = load_vae(tmp_path)[0].decode(LATENTS)
        torch.testing.assert_close(found, model.decode(LATENTS).sample, rtol=1e-4, atol=1e-5)


def test_a_folder_that_is_pickled_or_lacks_a_shard_says_so(tmp_path: Path) -> None:
    new_autoencoder(CONFIG).save_pretrained(tmp_path / "a", safe_serialization=False)
    with pytest.raises(CheckpointError, match=r"pickled weights \(diffusion_pytorch_model\.bin\)"):
        load_vae(tmp_path / "a")
    new_autoencoder(CONFIG).save_pretrained(tmp_path / "b", max_shard_size="20KB")
    shard = sorted((tmp_path / "b").glob("*-00002-of-*"))[0]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing, one of"):
        load_vae(tmp_path / "b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_out_channels": [32, 32 * 200]}, "do not belong together"),
        ({"layers_per_block": 2**20}, "do not belong together"),
        ({"norm_num_groups": 2**30}, "norm_num_groups"),
        ({"scaling_factor": 1e308}, "scaling_factor must be a number from 1e-06 to 1e"),
    ],
)
def test_absurd_sizes_end_before_memory_is_taken(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    new_autoencoder(CONFIG).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(NspError, match=message):
        load_vae(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "AutoencoderTiny"}, "an AutoencoderKL is needed"),
        ({"shift_factor": 0.1}, "shift_factor=0.1 is not supported"),
        ({"act_fn": "relu"}, "act_fn=relu is not supported"),
        ({"down_block_types": None}, "down_block_types=None is not supported"),
        ({"up_block_types": 1e308}, r"up_block_types=1e\+308 is not supported"),
        ({"up_block_types": ["AttnUpDecoderBlock2D"] * 2}, "up_block_types=.* is not supported"),
    ],
)
def test_other_autoencoders_are_refused(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    new_autoencoder(CONFIG).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        load_vae(tmp_path)


def test_the_sdxl_architecture_is_known() -> None:
    with torch.device("meta"):
        vae = Vae(SDXL_VAE)
    # stabilityai/sdxl-vae has 83,653,863 parameters.
    assert sum(p.numel() for p in vae.autoencoder.parameters()) == 83_653_863
    assert copy.copy(SDXL_VAE).downsampling == 8
