"""Folders of weights as the hub has them are read, and what is missing in one is named."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nsp.errors import CheckpointError
from nsp.weights.module_weights import bounded, load_state
from nsp.weights.weight_files import find_weights, read_arrays, read_shapes, write_safetensors

STEMS = ("diffusion_pytorch_model", "model")
PLAIN = "diffusion_pytorch_model.safetensors"


def folder_of(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).write_bytes(b"x")
    return folder


def index_of(folder: Path, name: str, *shards: str) -> None:
    weight_map = {str(number): shard for number, shard in enumerate(shards)}
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def found(folder: Path) -> list[str]:
    return [path.name for path in find_weights(folder, STEMS, what="autoencoder")]


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        ([PLAIN, "model.safetensors", "diffusion_pytorch_model.fp16.safetensors"], PLAIN),
        (["model.safetensors", "model.fp16.safetensors", "model.bin"], "model.safetensors"),
        (["model.safetensors", "diffusion_pytorch_model.fp16.safetensors"], "model.safetensors"),
        (["model.fp16.safetensors", "model.non_ema.safetensors"], "model.fp16.safetensors"),
        (["model.non_ema.safetensors"], "model.non_ema.safetensors"),
        (["model.bf16.safetensors", "flax_model.msgpack"], "model.bf16.safetensors"),
    ],
)
def test_the_plain_weights_are_taken_else_a_variant(
    names: list[str], taken: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert found(folder_of(tmp_path, *names)) == [taken]
    is_other = taken not in (PLAIN, "model.safetensors", "model.fp16.safetensors")
    assert (f"using {taken}" in caplog.text) == is_other


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["diffusion_pytorch_model.bin"], "pickled weights (diffusion_pytorch_model.bin) are not"),
        (["model.ckpt", "config.json"], "save the autoencoder again with safe_serialization=True"),
        (["model.a.safetensors", "model.b.safetensors"], "several variants (model.a.safetensors"),
        (["model-00001-of-00002.safetensors"], "index.json, which says what is in model-00001-of"),
        (["flax_model.msgpack", "x"], f"has no {PLAIN}; it contains flax_model.msgpack, x;"),
        ([], "it is empty"),
    ],
)
def test_what_a_folder_holds_instead_is_named(names: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        found(folder_of(tmp_path, *names))
    assert said in str(caught.value)


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_shards_are_those_of_the_index(variant: str, tmp_path: Path) -> None:
    shards = [f"model{variant}-0000{n}-of-00002.safetensors" for n in (1, 2)]
    folder_of(tmp_path, *shards)
    index_of(tmp_path, f"model.safetensors.index{variant}.json", *shards, shards[0])
    assert found(tmp_path) == shards
    (tmp_path / shards[1]).unlink()
    with pytest.raises(CheckpointError, match=rf"{shards[1]} is missing, one of 2 files"):
        found(tmp_path)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b", "", "..", "a\0b"])
def test_an_index_names_files_of_its_own_folder_only(name: str, tmp_path: Path) -> None:
    index_of(tmp_path, "model.safetensors.index.json", name)
    with pytest.raises(CheckpointError, match="is not a file of its own folder"):
        found(tmp_path)


def test_with_a_list_of_names_only_those_are_seen(tmp_path: Path) -> None:
    folder_of(tmp_path, PLAIN, "model.safetensors")
    listed = {"model.safetensors"}
    (path,) = find_weights(tmp_path, STEMS, what="autoencoder", listed=listed)
    assert path.name == "model.safetensors"


@contextmanager
def umask(value: int) -> Iterator[None]:
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize("tensor", [np.zeros(3), torch.zeros(3)], ids=["numpy", "torch"])
def test_written_tensors_are_readable_to_whom_the_umask_lets_read(
    tensor: object, tmp_path: Path
) -> None:
    for mask, mode in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        with umask(mask):
            write_safetensors({"a": tensor}, tmp_path / "a.safetensors")
        assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == mode
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]
    assert read_shapes(tmp_path / "a.safetensors") == {"a": (3,)}
    assert read_arrays(tmp_path / "a.safetensors")["a"].tolist() == [0, 0, 0]


def test_a_configuration_of_absurd_size_ends_before_memory_is_taken() -> None:
    shapes = [(4, 4), (4,)]
    with bounded(shapes, "here"):
        nn.Linear(4, 4)
    with (
        pytest.raises(CheckpointError, match=r"here: .* the file has 2 and 20"),
        bounded(shapes, "here"),
    ):
        nn.Linear(2**12, 2**12)
    with pytest.raises(CheckpointError, match="cannot be built"), bounded(shapes, "here"):
        nn.Linear(2**62, 2**62)
    with pytest.raises(CheckpointError, match="more than 73 tensors"), bounded(shapes, "here"):
        nn.ModuleList(nn.Linear(1, 1) for _ in range(2**20))
    with pytest.raises(ZeroDivisionError):  # outside it, errors are what they were
        nn.Linear(1 // 0, 1)
    nn.Linear(2**10, 2**8)


def test_a_buffer_that_training_measures_must_be_there() -> None:
    class Counts(nn.Module):
        MEASURED_BUFFERS = ("seen",)

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(2))
            self.register_buffer("table", torch.arange(2.0))
            self.register_buffer("angles", torch.arange(3.0), persistent=False)

    made, seen = Counts(), {"seen": torch.ones(2)}
    load_state(made, seen, "here")
    assert made.state_dict()["seen"].tolist() == [1, 1]
    load_state(made, {**seen, "angles": torch.arange(3.0)}, "here")  # written by another version
    with pytest.raises(CheckpointError, match="here: missing tensor seen"):
        load_state(made, {}, "here")
    with pytest.raises(CheckpointError, match="angles differs from what the configuration gives"):
        load_state(made, {**seen, "angles": torch.ones(3)}, "here")
