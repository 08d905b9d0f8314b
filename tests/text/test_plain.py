"""A plain text encoder computes what the public one does, saves, loads, exports and trains."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file

from nsp.artifacts.model_parts import load_text_model
from nsp.errors import CheckpointError, ConfigError
from nsp.text.encoder import save_text_encoder
from nsp.text.parts import TextEncoderSettings
from nsp.text.plain import PlainTextConfig, PlainTextModel
from nsp.text.plain_folder import check_plain_parts, load_plain, plain_parts
from nsp.text.tokenizer import train_tokenizer
from tests.goldens.inl_tiny.fixtures import tensors, weights

_ATOL = 1e-5  # absolute, as the goldens' README suggests
CONFIG = PlainTextConfig(vocab_size=96, width=48, depth=2, mlp_width=192, max_tokens=77)


@pytest.fixture(scope="module")
def model() -> PlainTextModel:
    made = PlainTextModel(CONFIG)
    made.load_state_dict(weights("text"))
    return made.eval()


@pytest.fixture
def folder(model: PlainTextModel, tmp_path: Path) -> Path:
    save_text_encoder(model, tmp_path / "text_encoder")
    return tmp_path / "text_encoder"


@torch.no_grad()
@pytest.mark.parametrize(
    "prompt", [("input_ids", "embeddings"), ("negative_ids", "negative_embeddings")]
)
def test_states_are_those_of_the_public_encoder(
    prompt: tuple[str, str], model: PlainTextModel
) -> None:
    io = tensors("text.")
    found = model(io[prompt[0]])[0]
    torch.testing.assert_close(found, io[prompt[1]], atol=_ATOL, rtol=0)


@torch.no_grad()
def test_states_are_those_of_torchs_own_layers() -> None:
    model = PlainTextModel(
        PlainTextConfig(vocab_size=9, width=16, depth=2, mlp_width=24, max_tokens=5)
    )
    layer = torch.nn.TransformerEncoderLayer(16, 8, 24, 0.0, batch_first=True)
    theirs = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    theirs.load_state_dict(model.encoder.state_dict())
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(model.encoder(x), theirs(x), atol=_ATOL, rtol=0)


def test_a_folder_loads_exactly(model: PlainTextModel, folder: Path) -> None:
    loaded = load_text_model(folder)
    assert isinstance(loaded, PlainTextModel)
    assert (loaded.config, loaded.training) == (CONFIG, False)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}


@torch.no_grad()
def test_it_exports_with_a_free_number_of_prompts(model: PlainTextModel, tmp_path: Path) -> None:
    ids = tensors("text.")["input_ids"]
    program = torch.onnx.export(
        model, (ids,), dynamo=True, dynamic_shapes=({0: torch.export.Dim("N")},), verbose=False
    )
    assert program is not None
    program.save(tmp_path / "plain.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "plain.onnx")
    three = ids[[0, 1, 0]]
    (found,) = session.run(None, {session.get_inputs()[0].name: three.numpy()})
    assert np.abs(found - model(three)[0].numpy()).max() < _ATOL


def test_a_new_one_fits_its_tokenizer_and_learns() -> None:
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["red apple", "green apple"], vocab_size=520, max_tokens=6)
    model = PlainTextModel(
        PlainTextConfig(
            vocab_size=tokenizer.vocab_size, width=16, depth=2, mlp_width=32, max_tokens=6
        )
    )
    check_plain_parts(model, tokenizer)
    ids = torch.from_numpy(tokenizer.encode(["red apple", "green apple"]))
    model(ids)[0].square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def edited(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: edited(f, depth=3), "missing tensor encoder.layers.2"),
        (lambda f: edited(f, depth=1), "extra tensor encoder.layers.1"),
        (lambda f: edited(f, mlp_width=7), "misshapen tensor encoder.layers.0.linear1"),
        (lambda f: edited(f, num_heads=7), "does not divide into 7 heads"),
        (lambda f: edited(f, width=-1), "width must be"),
        (lambda f: edited(f, depth=10**5), "do not belong together"),
        (lambda f: edited(f, dropout=0.1), "unknown key 'dropout'"),
        (lambda f: edited(f, model_type="bert"), "'bert'; one of"),
        (lambda f: changed(f, lambda s: s.pop("ln_final.bias")), "missing tensor ln_final.bias"),
        (lambda f: changed(f, lambda s: s["ln_final.bias"].fill_(torch.nan)), "contains NaN"),
        (lambda f: (f / "model.safetensors").unlink(), r"no model\.safetensors"),
        (lambda f: (f / "config.json").unlink(), "no config.json"),
    ],
)
def test_a_bad_folder_is_one_line(
    damage: Callable[[Path], Any], message: str, folder: Path
) -> None:
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_plain(folder)
    assert "\n" not in str(caught.value)


def test_parts_of_two_models_are_refused(model: PlainTextModel) -> None:
    tokenizer = train_tokenizer(["a cat"], vocab_size=520, max_tokens=6)
    with pytest.raises(ConfigError, match=r"vocab_size=96, but .* ids up to"):
        check_plain_parts(model, tokenizer)


def test_a_stream_has_no_captions_for_a_new_tokenizer() -> None:
    with pytest.raises(ConfigError, match="plain text encoder with --text-encoder"):
        plain_parts(TextEncoderSettings(), 16, 6, None)
