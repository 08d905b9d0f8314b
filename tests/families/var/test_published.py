"""Published weights are read in every form they are found in, and what does not fit is named."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nsp.artifacts.checkpoint import read_checkpoint
from nsp.errors import CheckpointError, ConfigError
from nsp.families.var.config import VarConfig
from nsp.families.var.published import convert, infer_config
from tests.goldens.var_tiny.fixtures import GOLDEN_DIR, document, part, tensors

VAE = GOLDEN_DIR / "weights_vae.safetensors"
VAR = GOLDEN_DIR / "weights_var.safetensors"


def predictor_state() -> dict[str, Tensor]:
    return dict(load_file(VAR))


def convert_predictor(state: dict[str, Any], tmp_path: Path, **options: Any) -> VarConfig:
    path = tmp_path / "predictor.safetensors"
    save_file(state, path)
    return convert(
        tokenizer=VAE, predictor=path, config=None, output_dir=tmp_path / "out", **options
    )


def test_configuration_follows_from_shapes(tmp_path: Path) -> None:
    inferred = convert(tokenizer=VAE, predictor=VAR, config=None, output_dir=tmp_path / "out")
    given = document("config")
    assert inferred.patch_nums == (1, 2, 3, 4)
    assert inferred.predictor.depth == given["var"]["depth"]
    assert inferred.predictor.num_heads == given["var"]["num_heads"]
    assert inferred.vae.share_quant_resi == given["vae"]["share_quant_resi"]
    assert inferred.vae.channel_multipliers == (1, 1, 2, 2, 4)
    assert inferred.num_classes == 10


def test_converted_folder_holds_the_same_numbers(tiny_class_checkpoint: Path) -> None:
    system = read_checkpoint(tiny_class_checkpoint).load()
    for module, name in ((system.vae, "weights_vae"), (system.predictor, "weights_var")):
        state = module.state_dict()
        for key, expected in tensors(name).items():
            assert torch.equal(state[key], expected), key
    assert not list(tiny_class_checkpoint.rglob("*.p*t*"))


def test_trainer_checkpoints_are_unwrapped(tmp_path: Path) -> None:
    nested = {"trainer": {"var_wo_ddp": predictor_state(), "vae_local": dict(load_file(VAE))}}
    path = tmp_path / "ar-ckpt-last.pth"
    torch.save(nested, path)
    config = convert(tokenizer=path, predictor=path, config=None, output_dir=tmp_path / "out")
    assert config.predictor.width == 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.1.attn.proj.weight"), "missing tensor blocks.1.attn.proj.weight"),
        (lambda s: s.update({"extra.weight": torch.zeros(2)}), "extra tensor extra.weight"),
        (lambda s: s.update({"head.bias": torch.zeros(3)}), r"misshapen tensor head.bias \(3,\)"),
        (lambda s: s["head.bias"].fill_(torch.nan), "head.bias contains NaN"),
        (lambda s: s.pop("class_emb.weight"), "missing tensor class_emb.weight"),
        (lambda s: s.update({"word_embed.weight": torch.zeros(3)}), r"word_embed.weight \(3,\)"),
        (lambda s: s.update({"class_emb.weight": torch.zeros(0, 64)}), r"class_emb.weight \(0"),
        (lambda s: s.update({"lvl_1L": torch.tensor([[-5, 10**12]])}), "lvl_1L has levels"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(change: Any, message: str, tmp_path: Path) -> None:
    state = predictor_state()
    change(state)
    with pytest.raises(CheckpointError, match=message):
        convert_predictor(state, tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "attacked",))

    path = tmp_path / "predictor.pth"
    path.write_bytes(pickle.dumps({"head.weight": Attack()}, protocol=2))
    with pytest.raises(CheckpointError, match="cannot be read as weights only") as caught:
        convert(tokenizer=VAE, predictor=path, config=None, output_dir=tmp_path / "out")
    assert not (tmp_path / "attacked").exists()
    assert "weights_only" not in str(caught.value)  # torch would advise to set it to False


def whole_pth(path: Path) -> bytes:
    torch.save(predictor_state(), path)
    return path.read_bytes()


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: b"hello\n",
        lambda whole: VAE.read_bytes()[:5000],
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole[-9000:],
        lambda whole: pickle.dumps({"head.weight": [1.0]}),
        lambda whole: pickle.dumps({3: None}),
        lambda whole: b"\x80\x02" + whole,
    ],
    ids=range(8),
)
def test_a_damaged_torch_file_is_one_line_without_advice_to_run_it(
    damage: Any, tmp_path: Path
) -> None:
    path = tmp_path / "predictor.pth"
    path.write_bytes(damage(whole_pth(path)))
    with pytest.raises(CheckpointError, match=r"predictor\.pth") as caught:
        convert(tokenizer=VAE, predictor=path, config=None, output_dir=tmp_path / "out")
    assert "weights_only" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_names_that_are_no_text_are_no_state_dict(tmp_path: Path) -> None:
    path = tmp_path / "predictor.pth"
    torch.save({1: torch.zeros(2)}, path)
    with pytest.raises(CheckpointError, match="does not contain a state dict"):
        convert(tokenizer=VAE, predictor=path, config=None, output_dir=tmp_path / "out")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere\.pth does not exist"):
        convert(tokenizer=VAE, predictor=tmp_path / "nowhere.pth", config=None, output_dir=tmp_path)


def test_heads_that_do_not_follow_are_asked_for() -> None:
    state = part(tensors("var_variants"), "plain/weights/")
    with pytest.raises(ConfigError, match="number of heads"):
        infer_config(tensors("weights_vae"), state, vae={}, var={})
    config = infer_config(tensors("weights_vae"), state, vae={}, var={"num_heads": 2})
    assert not config.predictor.attn_l2_norm
    assert config.predictor.mlp_ratio == 2.0


def test_an_unknown_argument_is_named() -> None:
    with pytest.raises(ConfigError, match=r"var\.num_head is not an argument"):
        infer_config(tensors("weights_vae"), tensors("weights_var"), vae={}, var={"num_head": 4})


def test_arguments_override_what_shapes_cannot_tell() -> None:
    vae = {"quant_resi": 0.7, "beta": 0.5, "using_znorm": True, "test_mode": True}
    config = infer_config(tensors("weights_vae"), tensors("weights_var"), vae=vae, var={})
    assert (config.vae.quant_resi, config.vae.using_znorm) == (0.7, True)


@pytest.mark.parametrize(
    ("part_", "name", "value"),
    [
        ("var", "num_classes", 7),
        ("var", "patch_nums", [1, 2, 3, 5]),
        ("vae", "v_patch_nums", [1, 2]),
        ("var", "depth", 5),
        ("var", "num_heads", 2),
        ("var", "shared_aln", True),
        ("vae", "vocab_size", "64"),
        ("vae", "share_quant_resi", 1),
    ],
)
def test_an_argument_that_contradicts_the_tensors_is_named(
    part_: str, name: str, value: Any, tmp_path: Path
) -> None:
    config = {part_: {name: value}}
    with pytest.raises(ConfigError, match=rf"{part_}\.{name}=.* contradicts the weights"):
        convert(tokenizer=VAE, predictor=VAR, config=config, output_dir=tmp_path / "out")


def test_an_unknown_part_of_the_arguments_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown key 'vra'; known: vae, var"):
        convert(tokenizer=VAE, predictor=VAR, config={"vra": {}}, output_dir=tmp_path / "out")


def test_a_file_in_the_way_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("mine")
    with pytest.raises(ConfigError, match="is a file"):
        convert(tokenizer=VAE, predictor=VAR, config=None, output_dir=path)
    assert path.read_text() == "mine"


def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty and not a checkpoint"):
        convert(tokenizer=VAE, predictor=VAR, config=None, output_dir=tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_arguments_of_the_wrong_kind_are_one_line(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="var must be an object with constructor"):
        convert(tokenizer=VAE, predictor=VAR, config={"var": 3}, output_dir=out)
    with pytest.raises(ConfigError, match="cond_drop_rate"):
        convert(tokenizer=VAE, predictor=VAR, config={"var": {"cond_drop_rate": 2}}, output_dir=out)
