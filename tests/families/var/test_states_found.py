"""Weights are found in wrappers, under prefixes and in any kind of file, or told what they are."""

import contextlib
import fractions
import logging
import os
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from nsp.artifacts.checkpoint import read_checkpoint
from nsp.errors import CheckpointError, ConfigError
from nsp.families.var.config import VarConfig
from nsp.families.var.published import convert, read_state
from tests.goldens.var_tiny.fixtures import document
from tests.weights.weight_states import POINTER, VAE, VAR, predictor_state, prefixed, saved


def read(path: Path) -> dict[str, Tensor]:
    return read_state(path, part="var_wo_ddp")


def converted(predictor: Path, tmp_path: Path, **options: Any) -> VarConfig:
    given = {"tokenizer": VAE, "predictor": predictor, "config": None, **options}
    return convert(**given, output_dir=tmp_path / "out")


def inside(name: str) -> str:
    """Return a name as torch.compile of single blocks leaves it."""
    return name.replace("blocks.0.", "blocks.0._orig_mod.")


def averaged() -> dict[str, Tensor]:
    return {"n_averaged": torch.tensor(3), **prefixed("module.")}


@pytest.mark.parametrize(
    "make",
    [
        lambda: prefixed("module."),
        lambda: prefixed("_orig_mod."),
        lambda: prefixed("model."),
        lambda: prefixed("module._orig_mod.model."),
        lambda: prefixed("net."),
        lambda: {"state_dict": prefixed("network.module.")},
        lambda: prefixed("model.") | {f"model_ema.{n}": t * 0 for n, t in prefixed("").items()},
        lambda: prefixed("net.") | {"ema.decay": torch.ones(1), "net_ema.head.bias": torch.ones(1)},
        lambda: {inside(name): tensor for name, tensor in predictor_state().items()},
        lambda: {"model": predictor_state(), "epoch": 3, "optimizer": {"state": {}}},
        lambda: {"state_dict": prefixed("model.")},
        lambda: {"model_state_dict": predictor_state(), "lr": 0.1},
        lambda: {"module": predictor_state()},
        lambda: {"model": {"module": {"state_dict": prefixed("module.")}}},
        lambda: {"trainer": {"var_wo_ddp": prefixed("_orig_mod."), "vae_local": {}}},
        averaged,
    ],
    ids=range(16),
)
def test_prefixes_and_wrappers_are_seen_through(make: Callable[[], Any], tmp_path: Path) -> None:
    found = read(saved(make(), tmp_path / "a.pth"))
    assert found.keys() == predictor_state().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in predictor_state().items())


@pytest.mark.parametrize(
    ("content", "taken", "said"),
    [
        (lambda a, b: {"state_dict": a, "ema": b}, "a", "using the weights under state_dict"),
        (lambda a, b: {"model": a, "model_ema": {"module": b}}, "a", "is under model_ema/module"),
        (lambda a, b: {"state_dict": a, "ema": {"shadow": b, "decay": 0.9}}, "a", "ema/shadow"),
        (lambda a, b: {"ema_state_dict": b, "step": 3}, "b", "using ema_state_dict"),
    ],
    ids=range(4),
)
def test_of_weights_and_their_moving_average_it_is_said_which_were_taken(
    content: Any, taken: str, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = {"a": {"w": torch.zeros(2)}, "b": {"w": torch.ones(2)}}
    found = read(saved(content(given["a"], given["b"]), tmp_path / "a.pth"))
    assert torch.equal(found["w"], given[taken]["w"])
    (line,) = [record.getMessage() for record in caplog.records]
    assert said in line
    assert "a.pth" in line


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"model": {"a": torch.zeros(1)}, "state_dict": {"b": torch.zeros(1)}}, "model and state"),
        ({"vae": {"a": torch.zeros(1)}, "var": {"b": torch.zeros(1)}}, "are under vae, var"),
        ({"epoch": 3, "args": {}}, "its keys are epoch, args"),
        ({"a": torch.zeros(1), "step": 3}, "these are not tensors: step"),
        ([torch.zeros(1)], "it contains a list"),
        ({}, "it is empty"),
    ],
    ids=range(6),
)
def test_what_a_file_holds_instead_is_named(content: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"a\.pth") as caught:
        read(saved(content, tmp_path / "a.pth"))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("beside", "named"),
    [
        (fractions.Fraction(1), "fractions.Fraction"),
        (np.float64(3), "numpy"),
        (Path("a"), "pathlib"),
    ],
)
def test_a_class_that_is_not_unpickled_is_named(beside: Any, named: str, tmp_path: Path) -> None:
    path = saved({"model": {"a": torch.zeros(1)}, "args": beside}, tmp_path / "a.pth")
    with pytest.raises(
        CheckpointError, match=rf"a\.pth .* contains an object of class {named}"
    ) as caught:
        read(path)
    assert "weights_only" not in str(caught.value)


def test_content_decides_how_a_file_is_read_not_its_name(tmp_path: Path) -> None:
    shutil.copy(VAR, tmp_path / "a.pth")
    saved(predictor_state(), tmp_path / "b.safetensors")
    legacy = tmp_path / "c.safetensors"
    torch.save(predictor_state(), legacy, _use_new_zipfile_serialization=False)
    for path in (tmp_path / "a.pth", tmp_path / "b.safetensors", legacy):
        assert read(path).keys() == predictor_state().keys()


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (POINTER.encode(), "stands for a file of 1,236,544,000 bytes; run: git lfs pull"),
        (b"<!DOCTYPE html><html><head>", "is a web page (HTML); download the file again, signed"),
        (b"", "is empty: 0 bytes; download"),
        (VAR.read_bytes()[:20_000], "has 20,000 bytes of "),
        (VAR.read_bytes()[:100], "has 100 bytes of at least "),
        (b'{"error": "Not found"}', 'is JSON ("{"error": "Not found"}"); a safetensors file, or'),
    ],
    ids=["pointer", "page", "empty", "cut", "header", "json"],
)
def test_what_lies_in_place_of_weights_is_told(
    content: bytes, said: str, name: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        converted(tmp_path / name, tmp_path)
    assert said in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert not (tmp_path / "out").exists()


def test_a_torch_file_that_was_cut_says_how_much_there_is(tmp_path: Path) -> None:
    path = saved(predictor_state(), tmp_path / "a.safetensors")
    os.truncate(path, 20_000)
    with pytest.raises(CheckpointError, match="cut short: it has 20,000 bytes"):
        converted(path, tmp_path)


@pytest.mark.parametrize("start", [0.1, 0.4, 0.7, 0.95])
def test_a_torch_file_with_spoilt_bytes_is_refused(start: float, tmp_path: Path) -> None:
    path = saved(predictor_state(), tmp_path / "a.pth")
    content = bytearray(path.read_bytes())
    first = int(len(content) * start)
    content[first : first + 100] = bytes(byte ^ 0x55 for byte in content[first : first + 100])
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.pth (is damaged: |cannot be read)") as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_one_spoilt_bit_of_a_weight_is_named_by_its_part(tmp_path: Path) -> None:
    state = predictor_state()
    path = saved(state, tmp_path / "a.pth")
    content = path.read_bytes()
    number = state["head.weight"].numpy().tobytes()
    at = content.index(number)
    path.write_bytes(content[:at] + bytes([number[0] ^ 1]) + content[at + 1 :])
    with pytest.raises(CheckpointError, match=r"a/data/\d+ has changed \(CRC-32\)"):
        read(path)


def test_no_spoilt_byte_of_a_torch_file_gives_other_weights(tmp_path: Path) -> None:
    draw, state = random.Random(3), {"a": torch.arange(50.0), "b": torch.zeros(7)}
    path = saved(state, tmp_path / "a.pth")
    content = path.read_bytes()
    for _ in range(400):
        spoilt = bytearray(content)
        last = draw.choice((len(content), 500))  # the list of parts lies at the end
        spoilt[-draw.randint(1, last)] = draw.choice((0, 255, draw.randrange(256)))
        path.write_bytes(spoilt)
        with contextlib.suppress(CheckpointError):
            torch.testing.assert_close(read(path), state, atol=0, rtol=0)


@pytest.mark.parametrize(("offset", "value"), [(38, 0x10), (20, 1), (24, 1)])
def test_a_part_of_two_meanings_is_refused(offset: int, value: int, tmp_path: Path) -> None:
    path = saved({"a": torch.zeros(1000)}, tmp_path / "a.pth")
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"a/data/0") - 46  # marked as a folder; either of its two sizes
    content[entry + offset] ^= value
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a/data/0 has changed"):
        read(path)


def test_a_torch_file_without_checksums_is_read_which_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(predictor_state(), tmp_path / "a.pth")
    finally:
        torch.serialization.set_crc32_options(before)
    assert read(path).keys() == predictor_state().keys()
    assert "a.pth was saved without checksums" in caplog.text


def test_a_file_that_unpacks_to_more_than_it_is_is_refused(tmp_path: Path) -> None:
    whole, small = saved({"a": torch.zeros(10**6)}, tmp_path / "a.pth"), tmp_path / "b.pth"
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(small, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    with pytest.raises(CheckpointError, match="was compressed after torch wrote it"):
        read(small)
    repeated = saved({"a": torch.zeros(1).expand(10**9)}, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match=r"a \(1000000000,\) is larger than the whole file"):
        read(repeated)


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.zeros(3, device="meta"), "tensor w contains no numbers"),
        (torch.zeros(3).to_sparse(), "tensor w contains a torch.sparse_coo tensor"),
    ],
)
def test_tensors_that_are_no_plain_weights_are_named(
    tensor: Tensor, said: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"a\.pth") as caught:
        read(saved({"model": {"w": tensor}}, tmp_path / "a.pth"))
    assert said.replace("tensor w", "tensor model.w") in str(caught.value)


@pytest.mark.parametrize(
    ("tokenizer", "predictor", "said"),
    [
        (VAE, VAE, "holds the image tokenizer of VAR; give the transformer of VAR"),
        (VAR, VAR, "holds the transformer of VAR (the predictor); give the image tokenizer"),
        (VAR, VAE, "weights_var.safetensors holds the transformer"),
    ],
)
def test_swapped_files_are_told_apart(
    tokenizer: Path, predictor: Path, said: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError) as caught:
        converted(predictor, tmp_path, tokenizer=tokenizer)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("name", "names", "said"),
    [
        ("a", ["base_model.model.blocks.0.attn.proj.lora_A.weight"], "holds an adapter (LoRA"),
        ("a", ["lora_unet_down.lora_up.weight", "x.alpha"], "holds an adapter (LoRA"),
        ("a", ["text_model.embeddings.token_embedding.weight"], "holds a CLIP text encoder"),
        ("a", ["decoder.up_blocks.0.x", "encoder.y"], "holds an AutoencoderKL"),
        ("a", ["foo.weight", "bar.bias"], "another kind of model: bar.bias, foo.weight"),
        ("a", ["word_embed.bias"], "part of the transformer of VAR"),
        ("a-00001-of-00001", ["word_embed.bias"], "part of the transformer of VAR"),
        ("a-00001-of-00003", ["word_embed.bias"], "is part 1 of 3 of a model; give its index"),
        ("a-00001-of-00003", ["foo"], "is part 1 of 3 of a model; give its index"),
    ],
)
def test_other_files_are_known_by_their_names(
    name: str, names: list[str], said: str, tmp_path: Path
) -> None:
    path = tmp_path / f"{name}.safetensors"
    save_file({name: torch.zeros(1) for name in names}, path)
    with pytest.raises(CheckpointError, match=name) as caught:
        converted(path, tmp_path)
    assert said in str(caught.value)


def test_a_part_of_the_right_model_is_told_by_its_name(tmp_path: Path) -> None:
    state = {n: t for n, t in predictor_state().items() if n != "head.weight"}
    path = tmp_path / "a-00001-of-00002.safetensors"
    save_file(state, path)
    with pytest.raises(CheckpointError, match=r"is part 1 of 2 of a model; give its index"):
        converted(path, tmp_path)


def test_weights_beside_their_average_in_one_state_dict_are_taken_which_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    both = {"model.w": torch.zeros(2), "model_ema.w": torch.ones(2)}
    assert torch.equal(read(saved(both, tmp_path / "a.pth"))["w"], torch.zeros(2))
    assert "a.pth: using the weights under model; their moving average is" in caplog.text


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    import json

    state = predictor_state()
    names = sorted(state)
    parts = {"m-1.safetensors": names[::2], "m-2.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: state[name] for name in held}, tmp_path / file)
    index = tmp_path / "m.safetensors.index.json"
    weight_map = {name: file for file, held in parts.items() for name in held}
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert read(index).keys() == state.keys()
    for name in ("/etc/passwd", "../m-1.safetensors", "a/../m-1.safetensors"):
        index.write_text(json.dumps({"weight_map": {**weight_map, names[0]: name}}))
        with pytest.raises(CheckpointError, match="is not a file of its own folder"):
            read(index)


@pytest.mark.parametrize(
    ("dtype", "said"),
    [(torch.int8, "has int8"), (torch.bool, "has bool"), (torch.int64, "has int64"),
     (torch.complex64, "has complex64")],
)  # fmt: skip
def test_integers_in_place_of_weights_are_refused_by_name(
    dtype: torch.dtype, said: str, tmp_path: Path
) -> None:
    state = predictor_state()
    state |= {n: t.to(dtype) for n, t in state.items() if n.endswith("fc1.weight")}
    name = rf"blocks\.0\.ffn\.fc1\.weight and 3 more {said}"
    with pytest.raises(CheckpointError, match=name) as caught:
        converted(saved(state, tmp_path / "a.pth"), tmp_path)
    assert ("quantized" in str(caught.value)) == (dtype in (torch.int8, torch.int64))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_of_eight_bits_are_announced_and_noted(
    dtype: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = predictor_state()
    state["head.weight"] = state["head.weight"].to(dtype)
    save_file(state, tmp_path / "a.safetensors")
    converted(tmp_path / "a.safetensors", tmp_path)
    lines = [record.getMessage() for record in caplog.records]
    (line,) = [line for line in lines if "a.safetensors: 1 of" in line]
    assert "rounded" in line
    notes = read_checkpoint(tmp_path / "out").notes
    assert notes["rounded_to_8_bits"]["predictor"].startswith("1 of ")


def test_buffers_that_follow_from_the_configuration_may_be_missing(
    tmp_path: Path, tiny_class_checkpoint: Path
) -> None:
    state = {n: t for n, t in predictor_state().items() if n != "lvl_1L" and "_bias_for" not in n}
    state = {n: t for n, t in state.items() if not n.endswith("zero_k_bias")}
    path = saved(state, tmp_path / "a.pth")
    with pytest.raises(ConfigError, match=r'give the right \{"var": \{"patch_nums"'):
        converted(path, tmp_path)
    converted(path, tmp_path, config={"var": {"patch_nums": [1, 2, 3, 4]}})
    found, whole = (read_checkpoint(f).load() for f in (tmp_path / "out", tiny_class_checkpoint))
    for name, tensor in whole.predictor.state_dict().items():
        assert torch.equal(found.predictor.state_dict()[name], tensor), name


def test_a_buffer_that_differs_from_what_is_computed_is_refused(tmp_path: Path) -> None:
    state = predictor_state()
    state["blocks.1.attn.zero_k_bias"][3] = 1
    with pytest.raises(CheckpointError, match=r"zero_k_bias differs from what the configuration"):
        converted(saved(state, tmp_path / "a.pth"), tmp_path)


def test_a_mask_that_is_none_is_computed_which_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = predictor_state()
    expected = state["attn_bias_for_masking"].clone()
    state["attn_bias_for_masking"].zero_()
    converted(saved(state, tmp_path / "a.pth"), tmp_path)
    assert (
        "attn_bias_for_masking differs from what the configuration gives: the computed one is used"
        in caplog.text
    )
    found = read_checkpoint(tmp_path / "out").load().predictor.attn_bias_for_masking
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["blocks.", "encoder.down.0.block.", "quantize.quant_resi."])
def test_absurd_names_are_one_line(name: str, tmp_path: Path) -> None:
    for path, option in ((VAR, "predictor"), (VAE, "tokenizer")):
        state = {**dict(read_state(path, part="")), f"{name}{'9' * 5000}.x": torch.zeros(1)}
        save_file(state, tmp_path / "a.safetensors")
        given = {"tokenizer": VAE, "predictor": VAR, option: tmp_path / "a.safetensors"}
        with pytest.raises(CheckpointError) as caught:
            convert(**given, config=None, output_dir=tmp_path / "out")
        assert len(str(caught.value)) < 1000


def test_the_configuration_of_the_goldens_is_taken_as_it_lies_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        config = converted(VAR, tmp_path, config=document("config"))
    assert config.patch_nums == (1, 2, 3, 4)
    (line,) = [r.getMessage() for r in caplog.records if "--config" in r.getMessage()]
    assert line.startswith("--config: only vae and var are used, not source, dtype, var_variants")


def test_arguments_that_no_memory_holds_are_refused_before_it_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"misshapen|they do not belong together"):
        converted(VAR, tmp_path, config={"var": {"mlp_ratio": 1000.0}})
    for value in (1e9, 1e308, float(2**63)):
        with pytest.raises(ConfigError, match="mlp_ratio must be a number from 0 to 1000, not"):
            converted(VAR, tmp_path, config={"var": {"mlp_ratio": value}})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_cast_as_a_whole_are_read_levels_included(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    state = {name: tensor.to(dtype) for name, tensor in predictor_state().items()}
    assert converted(saved(state, tmp_path / "a.pth"), tmp_path).patch_nums == (1, 2, 3, 4)
