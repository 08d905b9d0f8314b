"""The tokenizer computes what the public implementation computes; see tests/goldens/var_tiny."""

import pytest
import torch

from nsp.families.var.config import VaeConfig
from nsp.families.var.quantizer import MultiScaleQuantizer
from nsp.families.var.vqvae import VQVAE
from tests.goldens.var_tiny.fixtures import document, part, tensors, vae_config

CASES = sorted(document("config")["quant_variants"])


@pytest.fixture(scope="module")
def vae() -> VQVAE:
    model = VQVAE(VaeConfig(vocab_size=64, latent_channels=8, base_channels=32), (1, 2, 3, 4))
    model.load_state_dict(tensors("weights_vae"))
    return model.eval()


@torch.no_grad()
def test_encoder_quantizer_and_decoder_match(vae: VQVAE) -> None:
    io = tensors("io")
    encoded = vae.encoder(io["vae/img"])
    torch.testing.assert_close(encoded, io["vae/enc_out"], atol=1e-4, rtol=0)
    torch.testing.assert_close(vae.encode(io["vae/img"]), io["vae/f"], atol=1e-4, rtol=0)
    tokens, latents = vae.quantize.tokenize(io["vae/f"])
    for scale in range(4):
        assert torch.equal(tokens[scale], io[f"vae/idx/{scale}"])
        expected = io[f"vae/f_hat/{scale}"]
        torch.testing.assert_close(latents[scale], expected, atol=1e-5, rtol=0)
    for scale in (1, 3):
        image = vae.decode(latents[scale]).clamp(-1, 1)
        torch.testing.assert_close(image, io[f"vae/rec/{scale}"], atol=1e-4, rtol=0)
    teacher = vae.quantize.teacher_input(tokens[:-1])
    torch.testing.assert_close(teacher, io["vae/var_input"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_phi_of_every_scale_follows_float64_ties(case: str) -> None:
    record = document("config")["quant_variants"][case]
    config = vae_config(record["constructor"])
    expected = tuple(record["phi_index_per_scale"])
    if config.quant_resi:  # the identity has no phis to choose from
        assert config.phi_indices(len(expected)) == expected


@pytest.mark.parametrize(
    ("count", "scales", "expected"),
    [
        (4, 10, (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)),
        (4, 5, (0, 1, 2, 2, 3)),
        (4, 7, (0, 0, 1, 2, 2, 3, 3)),
        (4, 3, (0, 2, 3)),
        (3, 4, (0, 0, 1, 2)),
        (5, 6, (0, 0, 1, 2, 3, 4)),
        (0, 16, tuple(range(16))),
    ],
)
def test_phi_ties_of_other_schedules(count: int, scales: int, expected: tuple[int, ...]) -> None:
    config = VaeConfig(vocab_size=8, latent_channels=4, base_channels=32, share_quant_resi=count)
    assert config.phi_indices(scales) == expected


@pytest.mark.parametrize("case", CASES)
def test_training_pass_and_gradients_match(case: str) -> None:
    values = part(tensors("quant_variants"), f"{case}/")
    arguments = document("config")["quant_variants"][case]["constructor"]
    sides = arguments["v_patch_nums"]
    quantizer = MultiScaleQuantizer(vae_config(arguments), sides)
    missing, extra = quantizer.load_state_dict(part(values, "weights/quantize."), strict=False)
    assert (missing, extra) == (["ema_vocab_hit_SV"], [])
    f = values["f"].clone().requires_grad_()
    result = quantizer(f)
    (result.loss + (result.latents[-1] * values["vq/G"]).sum()).backward()
    for scale, tokens in enumerate(result.tokens):
        assert torch.equal(tokens, values[f"idx/{scale}"])
    torch.testing.assert_close(result.loss, values["vq/loss"], atol=1e-5, rtol=0)
    torch.testing.assert_close(result.latents[-1], values["vq/f_hat_st"], atol=1e-5, rtol=0)
    assert f.grad is not None
    torch.testing.assert_close(f.grad, values["vq/grad_f"], atol=1e-5, rtol=0)
    gradients = part(values, "vq/grad/quantize.")
    assert gradients
    for name, expected in gradients.items():
        actual = quantizer.get_parameter(name).grad
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_next_scale_inputs_match(case: str) -> None:
    values = part(tensors("quant_variants"), f"{case}/")
    arguments = document("config")["quant_variants"][case]["constructor"]
    quantizer = MultiScaleQuantizer(vae_config(arguments), arguments["v_patch_nums"])
    quantizer.load_state_dict(part(values, "weights/quantize."), strict=False)
    tokens, latents = quantizer.tokenize(values["f"])
    teacher = quantizer.teacher_input(tokens[:-1])
    torch.testing.assert_close(teacher, values["var_input"], atol=1e-5, rtol=0)
    for scale in range(len(tokens) - 1):
        expected = values[f"next_map/{scale}"].flatten(2).transpose(1, 2)
        actual = quantizer.downsample(latents[scale], scale + 1)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_autocast_changes_no_token(vae: VQVAE) -> None:
    latent = tensors("io")["vae/f"]
    with torch.autocast("cpu", torch.bfloat16):
        tokens, _ = vae.quantize.tokenize(latent)
        teacher = vae.quantize.teacher_input(tokens[:-1])
    for scale in range(4):
        assert torch.equal(tokens[scale], tensors("io")[f"vae/idx/{scale}"])
    assert teacher.dtype == torch.float32
