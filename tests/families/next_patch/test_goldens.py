"""Converted models compute what the public implementation computes.

Tolerances: 1e-4 absolute in float32, as the fixtures' README suggests; codes are well separated and
must be equal.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nsp.families.next_patch.config import GPT_SIZES, VQ_8, published
from nsp.families.next_patch.model import attend_all
from nsp.families.next_patch.system import NextPatchSystem
from nsp.family.order import Order
from nsp.family.registry import family
from nsp.layers.logits import filter_by_mass, filter_by_rank
from nsp.pipeline.pipeline import Pipeline, torch_pipeline
from nsp.raster.patches import averaged, patch_loss, patched
from nsp.raster.sampling import RasterSampling
from nsp.raster.vq import VqTokenizer
from tests.families.next_patch.models import golden
from tests.goldens.llamagen_tiny.fixtures import config, tensors

IO = tensors()
SIDE = config()["grid"]
# Of the reference's table: V = 16,384, ImageNet's classes.
PARAMETERS = {
    "B": 110_888_448,
    "L": 342_910_976,
    "XL": 774_699_520,
    "XXL": 1_410_972_672,
    "3B": 3_096_659_200,
}


def close(found: Tensor, name: str, atol: float = 1e-4) -> None:
    torch.testing.assert_close(found, IO[name], atol=atol, rtol=0)


def logits_of(system: NextPatchSystem, side: int) -> Tensor:
    free = torch.zeros(3, dtype=torch.bool)
    return system.logits(IO["c2i.labels"], free, IO["c2i.codes"], side)


@pytest.mark.parametrize("side", config()["patches"])
def test_patches_teach_what_the_public_trainer_teaches(side: int) -> None:
    system, codes = golden(), IO["c2i.codes"]
    if side > 1:
        close(
            averaged(system.gpt.tok_embeddings(codes), SIDE, side),
            name := f"c2i.train.p{side}.patch_embeddings",
        )
        assert torch.equal(patched(codes, SIDE, side), IO[name.replace("embeddings", "targets")])
    close(system.gpt.rotations(side), f"c2i.train.p{side}.freqs_cis", 1e-6)
    logits = logits_of(system, side)
    close(logits, f"c2i.train.p{side}.logits")
    loss = patch_loss(logits, codes, SIDE, side).mean()
    close(loss, f"c2i.train.p{side}.loss", 1e-5)
    named = dict(system.gpt.named_parameters())
    order = [named[name] for name in config()["grad_norm_order"]]
    gradients = torch.autograd.grad(loss, order, materialize_grads=True)
    norms = torch.stack([gradient.norm() for gradient in gradients])
    close(norms, f"c2i.train.p{side}.grad_norms")


def test_hidden_states_match_block_by_block() -> None:
    gpt, found = golden().gpt, []
    hooks = [layer.register_forward_hook(lambda m, i, o: found.append(o)) for layer in gpt.layers]
    logits_of(golden(), 1)
    for hook in hooks:
        hook.remove()
    close(found[0][:1], "c2i.train.p1.block0_out")
    close(found[-1][:1], "c2i.train.p1.block_last_out")


@torch.no_grad()
def test_keys_and_values_match_after_rotation() -> None:
    gpt, layers = golden().gpt, range(len(golden().gpt.layers))
    kept: list[list[Tensor]] = [[] for _ in layers]
    classes = torch.tensor([int(IO["c2i.sample.labels"][0]), golden().config.num_classes])
    codes = IO["c2i.sample.cfg.tokens"][:1].expand(2, -1)
    x = gpt.embed(gpt.cls_embedding(classes), codes)
    gpt.transformed(x, gpt.table[: x.shape[1]], [attend_all(None, kept[each]) for each in layers])
    for layer in (0, 3):
        for kind, found_LGJK in zip("kv", kept[layer], strict=True):
            close(found_LGJK.permute(1, 2, 0, 3), f"c2i.sample.cfg.{kind}_cache.layer{layer}")
    key_LGJK, value_LGJK = kept[0]
    assert not key_LGJK[0].any()  # the condition's key is zero, its value is not
    assert value_LGJK[0].all()


def pipeline(gpt: str, layout: str) -> Pipeline:
    return torch_pipeline(family("next_patch"), golden(gpt), kv_layout=layout, device="cpu")


@pytest.mark.parametrize("layout", ["delta", "fixed"])
@pytest.mark.parametrize(
    ("name", "gpt", "settings"),
    [
        ("c2i.sample.cfg", "gpt", {}),
        ("c2i.sample.nocfg", "gpt", {"guidance_scale": 1.0}),
        ("c2i.sample.cfg_interval", "gpt", {"cfg_interval": config()["sample"]["cfg_interval"]}),
        ("gqa.sample.cfg", "gpt_gqa", {}),
    ],
)
def test_greedy_traces_match_code_for_code(
    name: str, gpt: str, settings: dict[str, Any], layout: str
) -> None:
    sampling = RasterSampling(**{"guidance_scale": 2.0, "top_k": 1, **settings})
    orders = [Order(int(label), 0, sampling) for label in IO["c2i.sample.labels"]]
    trace = pipeline(gpt, layout).trace(orders)
    assert np.array_equal(np.concatenate(trace.tokens, 1), IO[f"{name}.tokens"].numpy())
    logits = np.concatenate(trace.logits, 1)
    expected = IO[f"{name}.cond_logits"]
    guided = sampling.num_guided(SIDE**2)
    if guided:
        null = IO[f"{name}.uncond_logits"][:, :guided]
        expected = torch.cat([null + 2.0 * (expected[:, :guided] - null), expected[:, guided:]], 1)
    assert np.abs(logits - expected.numpy()).max() < 1e-4
    if name == "c2i.sample.cfg":
        image = torch.from_numpy(trace.image)
        torch.testing.assert_close(
            image, (IO["final.image"].clamp(-1, 1) + 1) / 2, atol=1e-4, rtol=0
        )


def test_grouped_heads_match() -> None:
    logits = logits_of(golden("gpt_gqa"), 1)
    close(logits, "gqa.train.logits")
    close(patch_loss(logits, IO["c2i.codes"], SIDE, 1).mean(), "gqa.train.loss", 1e-5)


@torch.no_grad()
def test_the_tokenizer_matches() -> None:
    vq = golden().vq
    close(vq.encoder(IO["vq.images"]), "vq.encoder_out")
    latent = vq.encode(IO["vq.images"])
    close(latent, "vq.pre_quant")
    found = vq.quantize(latent)
    assert torch.equal(found.codes, IO["vq.codes"])
    close(found.latent, "vq.quant")
    close(vq.decode(IO["vq.quant"]), "vq.recon")
    vectors = vq.quantize.lookup(IO["vq.codes"]).unflatten(1, (SIDE, SIDE)).movedim(-1, 1)
    close(vq.decode(vectors), "vq.decode_code")
    plain = golden(l2_norm=False).vq
    codes = plain.tokenize(IO["vq.images"])
    assert torch.equal(codes, IO["vq.no_l2norm.codes"])
    vectors = plain.quantize.lookup(codes[:1]).unflatten(1, (SIDE, SIDE)).movedim(-1, 1)
    close(plain.decode(vectors), "vq.no_l2norm.decode_code")


@torch.no_grad()
def test_losses_of_the_tokenizer_match() -> None:
    vq = golden().vq
    vq.quantize.has_entropy = True
    try:
        found = vq.quantize(vq.encode(IO["vq.images"]))
    finally:
        vq.quantize.has_entropy = False
    assert found.entropy_loss is not None
    commitment = vq.config.commitment_weight * found.commitment_loss
    close(torch.stack([found.codebook_loss, commitment, found.entropy_loss]), "vq.train.losses")


@pytest.mark.parametrize("keep", [filter_by_rank, filter_by_mass])
@pytest.mark.parametrize("number", range(len(config()["filter_settings"])))
def test_filters_match(number: int, keep: Any) -> None:
    setting, logits = config()["filter_settings"][number], IO["filter.logits"][:, None]
    rows, codes = len(logits), logits.shape[-1]
    top_p = torch.full((rows,), setting["top_p"])
    top_k = torch.full((rows,), min(setting["top_k"], codes))  # the public code clamps it
    kept = keep(logits / setting["temperature"], top_p, top_k, torch.arange(codes))
    close(kept.softmax(-1)[:, 0], f"filter.{number}.probs", 1e-5)


@pytest.mark.parametrize("name", GPT_SIZES)
def test_sizes_have_the_published_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        gpt = NextPatchSystem(published(name)).gpt
    count = sum(parameter.numel() for parameter in gpt.parameters())
    assert count == PARAMETERS.get(name, count)


def test_tokenizers_have_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        counts = [
            sum(parameter.numel() for parameter in VqTokenizer(config).parameters())
            for config in (published("B").vq, VQ_8)
        ]
    assert counts == [71_883_403, 70_109_835]
