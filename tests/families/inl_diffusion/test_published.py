"""Published weights are read in every form they are found in, and a wrong file is named."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import Tensor

from nsp.artifacts.checkpoint import read_checkpoint
from nsp.cli import main
from nsp.errors import CheckpointError, ConfigError
from nsp.families.inl_diffusion.config import PUBLIC_NOISE, InlConfig
from nsp.families.inl_diffusion.integrator import MixtureIntegrator, ScalarIntegrator
from nsp.families.inl_diffusion.published import convert, infer_config, read_dit, read_vae
from nsp.families.inl_diffusion.system import InlSystem
from nsp.family.order import Order
from nsp.family.registry import family
from nsp.text.encoder import build_text_encoder, save_text_encoder
from nsp.text.t5 import build_t5
from nsp.text.tokenizer import train_tokenizer
from tests.families.inl_diffusion.golden import arguments, files, golden, state
from tests.goldens.inl_tiny.fixtures import GOLDEN_DIR

State = dict[str, Tensor]
PREFIX = "blocks.{}.integrator."


def converted(tmp_path: Path, given: Mapping[str, Any] | None = None, **paths: Path) -> InlConfig:
    found = {**files(tmp_path), **{name.replace("_", "-"): path for name, path in paths.items()}}
    return convert(found, arguments() if given is None else given, tmp_path / "out")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"model": s, "optimizer": {"state": {}}, "step": 3},
        lambda s: {"model_state_dict": s, "global_step": 3, "loss": 0.1},
        lambda s: {"state_dict": {f"module._orig_mod.{name}": t for name, t in s.items()}},
    ],
    ids=["plain", "trainer", "model_state_dict", "compiled"],
)
def test_all_wrappings_are_read(wrap: Callable[[State], Any], tmp_path: Path) -> None:
    paths = {"tokenizer": tmp_path / "vae_final.pt", "predictor": tmp_path / "dit_final.pt"}
    for path, name in zip(paths.values(), ("vae", "dit"), strict=True):
        torch.save(wrap(state(name)), path)
    assert converted(tmp_path, **paths) == golden().config


def test_a_checkpoint_is_written_that_names_its_sources(tmp_path: Path) -> None:
    converted(tmp_path)
    record = read_checkpoint(tmp_path / "out")
    assert record.notes["converted_from"] == {
        "tokenizer": "weights_vae.safetensors",
        "predictor": "weights_dit.safetensors",
        "text-encoder": "text_final.safetensors",
    }
    loaded = record.load()
    for name, tensor in state("dit").items():
        if name != "rope.inv_freq":
            assert torch.equal(loaded.dit.state_dict()[name], tensor), name


def test_values_follow_from_shapes(tmp_path: Path) -> None:
    parts = files(tmp_path)
    vae, dit = read_vae(parts["tokenizer"]), read_dit(parts["predictor"])
    told, wanted = infer_config(vae, dit, {}), golden().config
    assert (told.vae, told.dit) == (wanted.vae, wanted.dit)
    assert (told.noise, told.null_condition) == (PUBLIC_NOISE, "empty_prompt")
    assert (told.latent_side, wanted.latent_side) == (32, 8)  # the weights do not show it
    assert infer_config(vae, dit, {"vae": {"image_size": 64}}).latent_side == 8
    changed = infer_config(vae, dit, {"noise": {"prediction": "v_prediction"}})
    assert (changed.noise.prediction, changed.noise.clip) == ("v_prediction", 1.0)


def test_heads_follow_from_rotations_or_the_size_or_are_given(tmp_path: Path) -> None:
    found, path = state("dit"), tmp_path / "dit.safetensors"
    del found["rope.inv_freq"]
    save_file(found, path)
    vae, dit = read_vae(files(tmp_path)["tokenizer"]), read_dit(path)
    assert infer_config(vae, dit, {"dit": {"num_heads": 4}}).dit == golden().config.dit
    with pytest.raises(ConfigError, match="do not show the number of heads"):
        infer_config(vae, dit, {})  # heads of 64 channels do not fit


def mixture(found: State) -> None:
    """Make the integrators those of a mixture of experts, with its statistics."""
    width = 64
    for block in range(2):
        prefix = PREFIX.format(block)
        for name in [n for n in found if n.startswith(f"{prefix}controller.")]:
            del found[name]
        shapes = {
            "router.0.weight": (16, width),
            "router.0.bias": (16,),
            "router.2.weight": (4, 16),
            "router.2.bias": (4,),
            "shared_expert.0.weight": (64, 2 * width),
            "shared_expert.0.bias": (64,),
            "shared_expert.2.weight": (3 * width, 64),
            "shared_expert.2.bias": (3 * width,),
            "shared_weight": (),
            "expert_w1": (4, 2 * width, 64),
            "expert_b1": (4, 64),
            "expert_w2": (4, 64, 3 * width),
            "expert_b2": (4, 3 * width),
            "expert_counts": (4,),
            "total_tokens": (1,),
        }
        found |= {f"{prefix}{name}": torch.ones(shape) for name, shape in shapes.items()}


def documented(found: State) -> None:
    """Make the model that of the public documentation: a scalar weight, no controller, no null."""
    for block in range(2):
        prefix = PREFIX.format(block)
        for name in [n for n in found if n.startswith((f"{prefix}controller.", f"{prefix}mu"))]:
            del found[name]
        found[f"{prefix}integration_weight"] = torch.full((1,), 0.25)
    del found["null_embedding"]


@pytest.mark.parametrize(
    ("change", "kind", "module"),
    [(mixture, "mixture", MixtureIntegrator), (documented, "scalar", ScalarIntegrator)],
)
def test_other_integrators_are_recognised(
    change: Callable[[State], None], kind: str, module: type, tmp_path: Path
) -> None:
    found, path = state("dit"), tmp_path / "dit.safetensors"
    change(found)
    save_file(found, path)
    given = arguments()
    given["dit"] |= {"use_moe": kind == "mixture", "use_learned_null": kind == "mixture"}
    assert converted(tmp_path, given, predictor=path).dit.integrator == kind
    loaded = read_checkpoint(tmp_path / "out").load()
    assert isinstance(loaded.dit.blocks[1].integrator, module)


def test_files_in_half_precision_are_read(tmp_path: Path) -> None:
    """As the public converter writes them: it halves every tensor, computed ones included."""
    paths = {"tokenizer": tmp_path / "vae.safetensors", "predictor": tmp_path / "dit.safetensors"}
    for path, name in zip(paths.values(), ("vae", "dit"), strict=True):
        save_file({n: t.half() for n, t in state(name).items()}, path)
    assert converted(tmp_path, **paths) == golden().config


def test_another_factor_of_latents_is_kept(tmp_path: Path) -> None:
    found, path = state("vae"), tmp_path / "vae.safetensors"
    found["latent_scale"] = torch.tensor(0.5)
    save_file(found, path)
    assert converted(tmp_path, tokenizer=path).vae.latent_scale == 0.5


@pytest.mark.parametrize("kind", ["clip", "t5", "plain"])
def test_prompts_can_be_read_by_a_folder(kind: str, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["a cat"], vocab_size=520, max_tokens=77)
    build = build_t5 if kind == "t5" else build_text_encoder
    encoder: Any = build(tokenizer, width=48, depth=1, num_heads=2)
    if kind == "plain":
        assert golden().prompt_tokenizer is not None
        encoder, tokenizer = golden().text_encoder, golden().prompt_tokenizer
    save_text_encoder(encoder, tmp_path / "pipeline" / "text_encoder")
    tokenizer.save(tmp_path / "pipeline" / "tokenizer")
    assert converted(tmp_path, text_encoder=tmp_path / "pipeline").text == kind
    assert isinstance(read_checkpoint(tmp_path / "out").load(), InlSystem)


def test_an_empty_prompt_is_the_null_condition() -> None:
    owner, config = family("inl_diffusion"), golden().config
    assert owner.null_prompt(config, Order("a cat", 0, owner.sampling())) == ""


def changed(name: str, change: Callable[[State], Any]) -> Callable[[Path], dict[str, Path]]:
    def write(folder: Path) -> dict[str, Path]:
        found, path = state(name), folder / f"{name}.safetensors"
        change(found)
        save_file(found, path)
        option = {"vae": "tokenizer", "dit": "predictor"}[name]
        return {option: path}

    return write


def cut(folder: Path) -> dict[str, Path]:
    path = folder / "dit_final.pt"
    torch.save(state("dit"), path)
    path.write_bytes(path.read_bytes()[:-1000])
    return {"predictor": path}


def swapped(folder: Path) -> dict[str, Path]:
    found = files(folder)
    return {"tokenizer": found["predictor"], "predictor": found["tokenizer"]}


def twice(folder: Path) -> dict[str, Path]:
    return {"predictor": files(folder)["tokenizer"]}


def alone(folder: Path) -> dict[str, Path]:
    path = folder / "alone" / "text.safetensors"
    path.parent.mkdir()
    save_file(state("text"), path)
    return {"text_encoder": path}


def other_rates(found: State) -> None:
    found["rope.inv_freq"] = found["rope.inv_freq"] * 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (swapped, "weights_dit.* holds the transformer .* give it with --predictor"),
        (twice, "weights_vae.* holds the autoencoder .* give it with --tokenizer"),
        (cut, r"dit_final\.pt"),
        (lambda f: {"tokenizer": f / "none.pt"}, r"none\.pt does not exist"),
        (lambda f: {"text_encoder": f / "none"}, "none does not exist"),
        (lambda f: {"text_encoder": f}, "has no config.json; give a CLIP"),
        (lambda f: {"text_encoder": files(f)["predictor"]}, "give the text encoder"),
        (alone, r"has no tokenizer\.json"),
        (
            changed(
                "dit", lambda s: s.update({"patch_embed.proj.weight": torch.zeros(64, 8, 2, 2)})
            ),
            "reads latents of 8 channels, but .*weights_vae.* makes 4",
        ),
        (
            changed("dit", lambda s: s["final_layer.norm.weight"].fill_(torch.nan)),
            "final_layer.norm.weight contains NaN",
        ),
        (
            changed("vae", lambda s: s["latent_scale"].fill_(torch.inf)),
            "latent_scale is not one finite number",
        ),
        (
            changed("vae", lambda s: s.pop("decoder.mid_attn.qkv.bias")),
            "missing tensor decoder.mid_attn.qkv.bias",
        ),
        (changed("vae", lambda s: s.update(extra=torch.zeros(2))), "extra tensor extra"),
        (changed("vae", lambda s: s.pop("encoder.conv_out.weight")), "encoder.conv_out.weight"),
        (changed("dit", lambda s: s.pop("blocks.1.norm3.weight")), "missing tensor blocks.1.norm3"),
        (changed("dit", other_rates), "rotations of another kind"),
    ],
)
def test_a_file_that_does_not_fit_is_named(
    damage: Callable[[Path], dict[str, Path]], message: str, tmp_path: Path
) -> None:
    paths = damage(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        converted(tmp_path, **paths)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dit": {"n_heads": 4}}, r"dit\.n_heads is not an argument"),
        ({"dit": {"d_model": 32}}, r"dit\.d_model=32 contradicts"),
        ({"dit": {"num_heads": 8}}, r"dit\.num_heads=8 contradicts"),
        ({"dit": {"num_kv_heads": 4}}, r"dit\.num_kv_heads=4 contradicts"),
        ({"dit": {"use_moe": True}}, r"dit\.use_moe=True contradicts"),
        ({"dit": {"mlp_ratio": 2.0}}, r"dit\.mlp_ratio=2\.0 contradicts"),
        ({"dit": {"in_channels": 8}}, r"dit\.in_channels=8 contradicts"),
        ({"dit": {"img_size": 16}, "vae": {"image_size": 64}}, r"dit\.img_size=16 contradicts"),
        ({"vae": {"latent_dim": 8}}, r"vae\.latent_dim=8 contradicts"),
        ({"text_encoder": {"max_length": 16}}, r"text_encoder\.max_length=16 contradicts"),
        ({"text_encoder": {"num_heads": 5}}, "does not divide into 5 heads"),
        ({"noise": {"beta": 1}}, "unknown key 'beta'"),
        ({"vea": {}}, "unknown key 'vea'; known: vae, dit, text_encoder, noise"),
        ({"dit": 3}, "must be an object"),
    ],
)
def test_arguments_that_do_not_fit_are_named(
    given: Mapping[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        converted(tmp_path, given)
    assert not (tmp_path / "out").exists()


def test_the_command_converts_and_asks_for_a_text_encoder(tmp_path: Path) -> None:
    found, config = files(tmp_path), tmp_path / "config.json"
    config.write_text((GOLDEN_DIR / "config.json").read_text())
    words = ["convert", "--family", "inl_diffusion", "--output-dir", str(tmp_path / "out")]
    words += [*("--tokenizer", str(found["tokenizer"])), "--config", str(config)]
    words += ["--predictor", str(found["predictor"])]
    without = CliRunner().invoke(main, words)
    assert without.exit_code != 0
    assert "have no text encoder in them" in without.output
    done = CliRunner().invoke(main, [*words, "--text-encoder", str(found["text-encoder"])])
    assert done.exit_code == 0, done.output
    assert f"checkpoint: {tmp_path / 'out'}" in done.output
    assert json.loads((tmp_path / "out" / "config.json").read_text())["family"] == "inl_diffusion"
