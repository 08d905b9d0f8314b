"""The modules of inl_diffusion compute what the public code does, and have its sizes."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nsp.families.inl_diffusion.config import SIZES, DitConfig, InlConfig, VaeConfig
from nsp.families.inl_diffusion.integrator import INTEGRATORS, MixtureIntegrator
from nsp.families.inl_diffusion.model import InlDit
from nsp.families.inl_diffusion.vae import Vae
from tests.goldens.inl_tiny.fixtures import config, tensors, weights

_DIT, _VAE, _EXTRA = 5e-6, 1e-5, 2e-6  # absolute, as the goldens' README suggests


def _close(found: Tensor, wanted: Tensor, atol: float) -> None:
    torch.testing.assert_close(found, wanted, atol=atol, rtol=0)


@pytest.fixture(scope="module")
def dit() -> InlDit:
    model = InlDit(config())
    state = {n: t for n, t in weights("dit").items() if n != "rope.inv_freq"}
    model.load_state_dict(state)
    return model.eval()


@pytest.fixture(scope="module")
def vae() -> Vae:
    model = Vae(config().vae)
    model.load_state_dict(weights("vae"))
    return model.eval()


@torch.no_grad()
def test_the_transformer_predicts_as_the_public_one(dit: InlDit) -> None:
    io = tensors("dit.")
    _close(dit(io["latent"], io["timestep"], io["context"]), io["output"], _DIT)
    null = dit.null_embedding.expand(2, -1, -1)
    _close(dit(io["latent"], io["timestep"], null), io["output_null_context"], _DIT)


@torch.no_grad()
def test_its_parts_are_those_of_the_public_one(dit: InlDit) -> None:
    io, probe = tensors("dit."), tensors("dit.probe.")
    x = dit.patch_embed(io["latent"])
    _close(x, probe["patch_embed"], _DIT)
    _close(dit.t_embed(io["timestep"]), probe["t_emb"], _DIT)
    _close(dit.rotary(8), torch.stack([probe["rope_cos"], probe["rope_sin"]], -1), _DIT)
    block = dit.blocks[0]
    found, gate = block(
        x,
        dit.modulation(io["timestep"])[:, : 6 * dit.config.dit.width],
        dit.rotary(8),
        dit.read(io["context"])[0],
    )
    _close(found, probe["block0.out"], _DIT)
    _close(gate, probe["block0.halt_probs"].mean(1)[..., 0], _DIT)


@torch.no_grad()
def test_the_autoencoder_is_the_public_one(vae: Vae) -> None:
    io = tensors("vae.")
    mean, log_variance = vae.moments(io["image"])
    _close(mean, io["mean"], _VAE)
    _close(log_variance, io["logvar"], _VAE)
    _close(vae.encode(io["image"]), io["latent_mode"], _VAE)
    _close(vae.encode(io["image"], io["eps"]), io["latent_sampled"], _VAE)
    _close(vae.decode(io["decode_in"]), io["decode_out"], _VAE)


@pytest.mark.parametrize(("kind", "prefix"), [("scalar", "v1."), ("mixture", "moe.")])
@torch.no_grad()
def test_other_integrators_are_the_public_ones(kind: Any, prefix: str) -> None:
    io = tensors(prefix, "extras")
    integrator = INTEGRATORS[kind](
        DitConfig(width=16, num_heads=1, num_kv_heads=1, integrator=kind)
    )
    counted = ("expert_counts", "total_tokens")  # statistics of training
    state = {
        name.removeprefix("weight.").removeprefix("integrator."): each
        for name, each in io.items()
        if name.startswith("weight.") and not name.endswith(counted)
    }
    integrator.load_state_dict(state)
    _close(integrator(io["in"])[0], io["out"], _EXTRA)
    if isinstance(integrator, MixtureIntegrator):
        assert torch.equal(
            integrator.shares(io["in"]).topk(2).indices.sort().values,
            io["top_k_experts"].sort().values,
        )


def _count(module: nn.Module) -> float:
    return round(sum(each.numel() for each in module.parameters()) / 1e6, 2)


# Of the public code itself; its documentation says about 100, 250, 500, 700 and 1,500.
@pytest.mark.parametrize(
    ("size", "millions"),
    [
        ("S", 65.63),
        ("B", 223.97),
        ("L", 747.40),
        ("XL", 1084.66),
        ("XXL", 2132.65),
        ("L-MoE", 730.42),
        ("XL-MoE", 1053.08),
    ],
)
def test_sizes_have_the_true_numbers_of_parameters(size: str, millions: float) -> None:
    with torch.device("meta"):
        assert _count(InlDit(SIZES[size])) == millions


@pytest.mark.parametrize(("size", "millions"), [("S", 61.02), ("B", 206.07), ("XXL", 1943.48)])
def test_sizes_of_the_documented_form_have_theirs(size: str, millions: float) -> None:
    config = SIZES[size]
    config = dataclasses.replace(config, dit=dataclasses.replace(config.dit, integrator="scalar"))
    with torch.device("meta"):
        dit = InlDit(config)
        del dit.null_embedding  # came later
        assert _count(dit) == millions


def test_the_autoencoder_has_its_number_of_parameters() -> None:
    with torch.device("meta"):
        vae = Vae(VaeConfig())
    assert sum(each.numel() for each in vae.parameters()) == 88_912_011
    assert len(vae.state_dict()) == 267


def test_state_has_the_published_names() -> None:
    own = InlDit(config()).state_dict().keys()
    assert own == weights("dit").keys() - {"rope.inv_freq"}
    assert isinstance(config(), InlConfig)
