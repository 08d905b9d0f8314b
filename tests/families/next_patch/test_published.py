"""Published weights are read in every form they are found in, and what does not fit is named."""

import dataclasses
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nsp.errors import CheckpointError, ConfigError
from nsp.families.next_patch import NextPatch
from nsp.families.next_patch.config import CaptionCondition, published
from nsp.families.next_patch.model import Gpt
from nsp.families.next_patch.published import convert, infer_config
from nsp.raster.sampling import RasterSampling
from tests.families.next_patch.models import golden
from tests.goldens.llamagen_tiny.fixtures import arguments, config, tensors, weights

State = dict[str, Tensor]
SIDE = config()["grid"]


def state(name: str = "gpt") -> State:
    return dict(load_file(weights(name)))


def converted(tmp_path: Path, given: Mapping[str, Any] | None = None, **files: Path) -> Any:
    files = {"tokenizer": weights("vq"), "predictor": weights("gpt"), **files}
    given = arguments() if given is None else given
    return convert(**files, config=given, output_dir=tmp_path / "out")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"model": s, "optimizer": {"state": {}}, "steps": 3, "args": Namespace(lr=1)},
        lambda s: s,
        lambda s: {"module": s},
        lambda s: {"state_dict": s},
        lambda s: {"model": {f"module._orig_mod.{name}": t for name, t in s.items()}},
    ],
    ids=["ddp", "fsdp", "deepspeed", "state_dict", "compiled"],
)
def test_all_wrappings_are_read(wrap: Callable[[State], Any], tmp_path: Path) -> None:
    paths = {"tokenizer": tmp_path / "vq.pt", "predictor": tmp_path / "gpt.pt"}
    for path, name in zip(paths.values(), ("vq", "gpt"), strict=True):
        torch.save(wrap(state(name)), path)
    assert converted(tmp_path, **paths) == golden().config


def test_values_follow_from_shapes_and_arguments() -> None:
    vq, gpt = state("vq"), state()
    told = infer_config(vq, gpt, {"gpt": {"n_head": 4}, "grid": SIDE})
    assert told.gpt.hidden_width == config()["gpt"]["ffn_hidden_dim"]
    assert (told.vq, told.num_classes) == (golden().config.vq, 10)
    assert infer_config(vq, gpt, {"gpt": {"n_head": 4}}).grid_side == 16
    old = {**gpt, "freqs_cis": torch.zeros(1 + SIDE**2, 10, 2)}
    assert infer_config(vq, old, {"gpt": {"n_head": 4}}).grid_side == SIDE
    grouped = infer_config(vq, state("gpt_gqa"), {"gpt": {"n_head": 4}})
    assert (grouped.gpt.num_kv_heads, grouped.gpt.hidden_width) == (2, 128)
    caption = infer_config(vq, state("gpt_t2i"), arguments("gpt_t2i")).condition
    assert caption == CaptionCondition(text_width=40, max_tokens=8)
    assert infer_config(vq, state("gpt_t2i"), {}).gpt.num_heads == 1  # 64 channels a head


def test_an_old_checkpoint_with_its_table_is_read(tmp_path: Path) -> None:
    path = tmp_path / "gpt.safetensors"
    save_file({**state(), "freqs_cis": tensors()["c2i.train.p1.freqs_cis"].contiguous()}, path)
    assert converted(tmp_path, predictor=path) == golden().config


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("vq", lambda s: s.pop("decoder.mid.1.k.bias"), "missing tensor decoder.mid.1.k.bias"),
        ("vq", lambda s: s.update(extra=torch.zeros(2)), "extra tensor extra"),
        ("vq", lambda s: s.pop("quant_conv.weight"), "missing tensor quant_conv.weight"),
        ("gpt", lambda s: s["norm.weight"].fill_(torch.nan), "norm.weight contains NaN"),
        ("gpt", lambda s: s.pop("layers.3.ffn_norm.weight"), "missing tensor layers.3.ffn_norm"),
        ("gpt", lambda s: s.update({"tok_embeddings.weight": torch.zeros(7, 80)}), "knows 7 codes"),
        ("gpt", lambda s: s.pop("tok_embeddings.weight"), "give the predictor of LlamaGen"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(
    name: str, change: Callable[[State], Any], message: str, tmp_path: Path
) -> None:
    found, path = state(name), tmp_path / f"{name}.safetensors"
    change(found)
    save_file(found, path)
    with pytest.raises(CheckpointError, match=message) as caught:
        converted(tmp_path, **{{"vq": "tokenizer", "gpt": "predictor"}[name]: path})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_swapped_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"weights_gpt.* give it with --predictor"):
        converted(tmp_path, tokenizer=weights("gpt"), predictor=weights("vq"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gpt": {"n_heads": 4}}, r"gpt\.n_heads is not an argument"),
        ({"gpt": {"dim": 64}}, r"gpt\.dim=64 contradicts"),
        ({"gpt": {"n_head": 4, "num_classes": 1000}}, r"gpt\.num_classes=1000 contradicts"),
        ({"gpt": {"n_head": 4, "model_type": "t2i"}}, r"gpt\.model_type='t2i' contradicts"),
        ({"gpt": {"n_head": 4, "n_kv_head": 2}}, r"gpt\.n_kv_head=2 contradicts"),
        ({"gpt": {"n_head": 4, "block_size": 65}}, "no square"),
        ({"gpt": {"n_head": 4, "block_size": 64}, "grid": 16}, "contradicts"),
        ({"vq": {"codebook_size": 16}}, r"vq\.codebook_size=16 contradicts"),
        ({"gpt": {}}, "do not show the number of heads"),
        ({"vp": {}}, "unknown key 'vp'; known: vq, gpt, grid"),
        ({"vq": 3}, "must be an object"),
    ],
)
def test_arguments_that_do_not_fit_are_named(
    given: Mapping[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        converted(tmp_path, given)
    assert not (tmp_path / "out").exists()


def test_what_is_in_the_way_is_kept(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ConfigError, match="is a file"):
        converted(tmp_path)
    (tmp_path / "out").unlink()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="not empty and not a checkpoint"):
        converted(tmp_path)


def test_drop_path_grows_with_depth() -> None:
    gpt = golden().config.gpt
    changed = dataclasses.replace(gpt, drop_path_rate=0.3)
    model = Gpt(dataclasses.replace(golden().config, gpt=changed))
    assert [layer.drop_path_rate for layer in model.layers] == pytest.approx([0, 0.1, 0.2, 0.3])


def test_an_archive_has_the_name_that_the_public_code_gives_it() -> None:
    given: Any = {"model": "c2i_B_384", "size_eval_px": 256, "seed": 0}
    family = NextPatch()
    chosen = RasterSampling(guidance_scale=2.0)
    name = family.sample_name(published("B", grid_side=24), chosen, size_px=384, **given)
    same = "GPT-B-c2i_B_384-size-384-size-256-VQ-16-topk-0-topp-1.0-temperature-1.0-cfg-2.0-"
    assert name == f"{same}seed-0"
    chosen = RasterSampling(guidance_scale=2.0, cfg_interval=25)
    other = family.sample_name(published("B", grid_side=24), chosen, size_px=384, **given)
    assert other == f"{same}interval-25-seed-0"
