"""What the text encoder promises: CLIP's numbers, in PyTorch and after export."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file

from nsp.errors import CheckpointError, ConfigError
from nsp.text.encoder import (
    TextEncoderStage,
    build_text_encoder,
    check_text_parts,
    load_text_encoder,
    save_text_encoder,
)
from nsp.text.tokenizer import PromptTokenizer, train_tokenizer
from tests.weights.weight_states import POINTER

if TYPE_CHECKING:
    from transformers import CLIPTextModel

PROMPTS = ["red apple", "a", "red apple on a blue car, and then it goes on and on"]
# Before any tokenizer's time: the largest id is the end token wherever it stands, also twice.
LEGACY_IDS = torch.tensor([[7, 3, 9, 9, 0, 0], [2, 11, 2, 2, 2, 11], [4, 4, 4, 4, 4, 4]])


@pytest.fixture(scope="module")
def tokenizer() -> PromptTokenizer:
    return train_tokenizer(["red apple", "blue car"] * 2, vocab_size=530, max_tokens=12)


@pytest.fixture
def model(tokenizer: PromptTokenizer) -> "CLIPTextModel":
    torch.manual_seed(0)
    return build_text_encoder(tokenizer, width=32, depth=2, num_heads=4).eval()


@pytest.fixture
def token_ids(tokenizer: PromptTokenizer) -> torch.Tensor:
    return torch.from_numpy(tokenizer.encode(PROMPTS))


@pytest.fixture
def folder(model: "CLIPTextModel", tmp_path: Path) -> Path:
    save_text_encoder(model, tmp_path / "text_encoder")
    return tmp_path / "text_encoder"


def with_eos(model: "CLIPTextModel", eos_id: int) -> "CLIPTextModel":
    model.config.eos_token_id = model.eos_token_id = eos_id
    return model


def largest_difference(ours: object, reference: object) -> float:
    return float(np.abs(np.asarray(ours) - np.asarray(reference)).max())


def test_it_fits_its_tokenizer(tokenizer: PromptTokenizer, model: "CLIPTextModel") -> None:
    config = model.config
    assert (config.bos_token_id, config.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert config.pad_token_id == tokenizer.pad_id
    assert (config.vocab_size, config.max_position_embeddings) == (tokenizer.vocab_size, 12)
    assert (config.hidden_act, config.intermediate_size) == ("quick_gelu", 128)


@pytest.mark.parametrize("eos", ["first end token", "legacy", "no end token"])
@torch.no_grad()
def test_stage_equals_clip_text_model(
    model: "CLIPTextModel", token_ids: torch.Tensor, eos: str
) -> None:
    if eos == "legacy":
        model, token_ids = with_eos(model, 2), LEGACY_IDS
    elif eos == "no end token":
        token_ids = LEGACY_IDS
    expected = model(input_ids=token_ids)
    states, pooled = TextEncoderStage(model)(token_ids)
    torch.testing.assert_close(states, expected.last_hidden_state, atol=1e-6, rtol=0)
    torch.testing.assert_close(pooled, expected.pooler_output, atol=1e-6, rtol=0)
    assert pooled.shape == (3, 32)


@torch.no_grad()
def test_a_model_with_eager_attention_stays_causal(
    model: "CLIPTextModel", token_ids: torch.Tensor
) -> None:
    expected = model(input_ids=token_ids).last_hidden_state
    model.set_attn_implementation("eager")
    states, _ = TextEncoderStage(model)(token_ids)
    torch.testing.assert_close(states, expected, atol=1e-6, rtol=0)


def export(stage: TextEncoderStage, token_ids: torch.Tensor, path: Path, opset: int) -> None:
    torch.onnx.export(
        stage.eval(),
        (token_ids,),
        path,
        dynamo=True,
        opset_version=opset,
        dynamic_shapes={"token_ids_BT": {0: torch.export.Dim("B")}},
        input_names=["token_ids"],
        output_names=["text_states", "text_pooled"],
        verbose=False,
    )


# torch 2.13 copies a deprecated class of its own while it exports.
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.parametrize(
    ("opset", "eos_id"), [(18, None), (23, None), (18, 2)], ids=["18", "23", "18-legacy"]
)
def test_onnx_runtime_matches_pytorch_for_any_batch(
    model: "CLIPTextModel", token_ids: torch.Tensor, tmp_path: Path, opset: int, eos_id: int | None
) -> None:
    if eos_id is not None:
        model, token_ids = with_eos(model, eos_id), LEGACY_IDS
    stage, path = TextEncoderStage(model), tmp_path / "text_encoder.onnx"
    export(stage, token_ids, path, opset)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for batch in (1, 2, 3):
        # Rows in another order than at export, so that nothing traced can be right by chance.
        fed = token_ids.flip(0)[:batch]
        with torch.no_grad():
            expected = stage(fed)
        got = session.run(["text_states", "text_pooled"], {"token_ids": fed.numpy()})
        for ours, reference in zip(got, expected, strict=True):
            assert largest_difference(ours, reference) <= 1e-5
    graph = onnx.load(path)
    assert {entry.domain: entry.version for entry in graph.opset_import}[""] == opset
    operators = {node.op_type for node in graph.graph.node}
    assert ("Attention" in operators) == (opset >= 23)
    assert all(node.domain == "" for node in graph.graph.node)
    if opset == 18:  # what TensorRT parses and builds in any precision
        assert operators <= {
            "Add", "Cast", "Concat", "Equal", "Gather", "IsNaN", "LayerNormalization", "MatMul",
            "Mul", "ReduceMax", "ReduceSum", "Reshape", "Shape", "Sigmoid", "Slice", "Softmax",
            "Sub", "Transpose", "Unsqueeze", "Where",
        }  # fmt: skip


def test_it_trains_end_to_end(model: "CLIPTextModel", token_ids: torch.Tensor) -> None:
    states, pooled = TextEncoderStage(model.train())(token_ids)
    (states.square().mean() + pooled[:, :5].square().mean()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # A key bias moves all scores of a query alike, so its gradient is zero up to rounding.
        assert parameter.grad.abs().sum() > 0 or name.endswith("k_proj.bias"), name


def test_bf16_autocast_keeps_float32_states_near_the_exact_ones(
    model: "CLIPTextModel", token_ids: torch.Tensor
) -> None:
    stage = TextEncoderStage(model)
    with torch.no_grad():
        exact, _ = stage(token_ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states, pooled = stage(token_ids)
    assert states.dtype == pooled.dtype == torch.float32
    # States have unit variance; bf16 keeps 8 bits, and two layers add a few roundings.
    torch.testing.assert_close(states, exact, atol=0.05, rtol=0)
    end = (token_ids == model.config.eos_token_id).int().argmax(dim=1)
    assert torch.equal(pooled, states[torch.arange(3), end])
    pooled.sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def assert_same_weights(one: torch.nn.Module, other: torch.nn.Module) -> None:
    torch.testing.assert_close(one.state_dict(), other.state_dict(), atol=0, rtol=0)


def test_saved_weights_load_unchanged_here_and_in_transformers(
    model: "CLIPTextModel", folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers import CLIPTextModel

    loaded = load_text_encoder(folder.parent, subfolder="text_encoder")
    assert_same_weights(loaded, model)
    assert not loaded.training
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert capfd.readouterr() == ("", "")
    assert_same_weights(CLIPTextModel.from_pretrained(folder), model)


def test_published_layouts_load(model: "CLIPTextModel", folder: Path, tmp_path: Path) -> None:
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    # As Stable Diffusion 1.5 has it: prefixed names, and positions that are not weights.
    published = {f"text_model.{name}": tensor for name, tensor in tensors.items()}
    published["text_model.embeddings.position_ids"] = torch.arange(12)[None]
    save_file(published, weights, metadata={"format": "pt"})
    assert_same_weights(load_text_encoder(folder), model)
    # Half precision under its own name, as pipelines offer it for small downloads.
    half = {name: tensor.half() for name, tensor in tensors.items()}
    save_file(half, folder / "model.fp16.safetensors", metadata={"format": "pt"})
    weights.unlink()
    loaded = load_text_encoder(folder)
    assert loaded.dtype == torch.float32
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), atol=1e-3, rtol=1e-3)


def test_the_text_half_of_a_whole_clip_loads(model: "CLIPTextModel", tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
              "num_attention_heads": 1, "image_size": 4, "patch_size": 4}  # fmt: skip
    whole = CLIPModel(CLIPConfig(text_config=model.config.to_dict(), vision_config=vision))
    whole.save_pretrained(tmp_path / "clip")
    assert_same_weights(load_text_encoder(tmp_path / "clip"), whole.text_model)


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def drop_a_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["final_layer_norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def add_a_weight(folder: Path, name: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = torch.zeros(3)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def truncate_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "not a transformers config"),
        (lambda folder: (folder / "config.json").write_text("[" * 100_000), "too deeply"),
        (lambda folder: edit_config(folder, model_type="t5"), "type 't5'"),
        (lambda folder: edit_config(folder, hidden_size="wide"), "cannot be loaded"),
        (lambda folder: edit_config(folder, max_position_embeddings=13), "wrong shape for 1"),
        (lambda folder: edit_config(folder, num_hidden_layers=3), "lacks 16 weights"),
        (lambda folder: edit_config(folder, num_hidden_layers=1),
         "does not use 16 weights, first encoder.layers.1.layer_norm1.bias"),
        (lambda folder: add_a_weight(folder, "encoder.layers.0.mlp.fc1.lora_A.weight"),
         "does not use 1 weights, first encoder.layers.0.mlp.fc1.lora_A"),
        (lambda folder: add_a_weight(folder, "text_model.embeddings.segment.weight"),
         "does not use 1 weights, first embeddings.segment.weight"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
         "no model.safetensors"),
        (drop_a_weight, "lacks 1 weights, first final_layer_norm.weight"),
        (truncate_weights, "cut short: it has 174,116 bytes of 174,216"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_refused_in_one_line(
    folder: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as refusal:
        load_text_encoder(folder)
    assert "\n" not in str(refusal.value)


def shard(folder: Path) -> None:
    """Cut the weights into two files with an index, as the hub has large ones."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in
                  enumerate(sorted(tensors))}  # fmt: skip
    for file in sorted(set(weight_map.values())):
        part = {name: tensors[name] for name in tensors if weight_map[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_and_prefixed_names_load(model: "CLIPTextModel", folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    named = {f"module.text_model.{name}": tensor for name, tensor in tensors.items()}
    save_file(named, folder / "model.safetensors")
    shard(folder)
    assert_same_weights(load_text_encoder(folder), model)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors is missing"):
        load_text_encoder(folder)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\x00" * 5000, "is a file of an unknown kind; a JSON object is needed here"),
        (POINTER.encode(), "is a Git LFS pointer"),
        (b"<!doctype html>", "is a web page"),
        (b"", "is empty: 0 bytes"),
        (b'{"model_type": "clip_text_model", "hidden_size": 1e99}', "cannot be loaded"),
    ],
)
def test_a_config_that_is_none_is_told_not_quoted(folder: Path, content: bytes, said: str) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError) as refusal:
        load_text_encoder(folder)
    assert said in str(refusal.value)
    assert len(str(refusal.value)) < 600


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 2**40},
        {"num_hidden_layers": 10**6},
        {"vocab_size": 2**62},
        {"max_position_embeddings": 2**31},
        {"num_attention_heads": 0},
        {"hidden_act": "frob"},
        {"intermediate_size": -3},
    ],
)
def test_sizes_that_the_weights_do_not_have_end_before_memory_is_taken(
    folder: Path, change: dict[str, object]
) -> None:
    edit_config(folder, **change)
    with pytest.raises(CheckpointError, match="text_encoder"):
        load_text_encoder(folder)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("layer_norm_eps", [None, 1e308, -1.0, 1e-300, float("nan")]),
        ("num_attention_heads", [-1, 0, True]),
        ("attention_dropout", [-1, 1.5, None]),
        ("eos_token_id", [None, [1, 2], -1]),
    ],
)
def test_a_number_that_no_encoder_has_is_named_before_the_first_prompt(
    folder: Path, name: str, values: list[object]
) -> None:
    for value in values:
        edit_config(folder, **{name: value})
        with pytest.raises(CheckpointError, match=f"cannot be loaded: .*{name}") as refusal:
            load_text_encoder(folder)
        assert "\n" not in str(refusal.value)


def test_what_is_not_of_the_network_is_not_read_from_its_configuration(
    model: "CLIPTextModel", token_ids: torch.Tensor, folder: Path
) -> None:
    edit_config(folder, attn_implementation=3, output_hidden_states=1.5, quantization_config=[1])
    loaded = load_text_encoder(folder)
    assert_same_weights(loaded, model)
    assert torch.equal(
        TextEncoderStage(loaded)(token_ids)[1], TextEncoderStage(model)(token_ids)[1]
    )


def test_integers_in_place_of_weights_are_refused(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["final_layer_norm.weight"] = tensors["final_layer_norm.weight"].to(torch.int8)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"final_layer_norm\.weight has int8"):
        load_text_encoder(folder)


def test_saved_weights_are_as_readable_as_their_config(folder: Path) -> None:
    modes = {path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert len(modes) == 1


def test_a_wrong_folder_says_where_to_look(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="pass subfolder='text_encoder'"):
        load_text_encoder(folder.parent)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_text_encoder(folder / "nowhere")


@pytest.mark.parametrize(
    "size", [{"width": 30}, {"depth": 0}, {"num_heads": 0}, {"mlp_ratio": 0.0}, {"width": -4}]
)
def test_sizes_that_make_no_network_are_refused(
    tokenizer: PromptTokenizer, size: dict[str, float]
) -> None:
    sizes = {"width": 32, "depth": 1, "num_heads": 4} | size
    with pytest.raises(ConfigError, match="multiple of num_heads"):
        build_text_encoder(tokenizer, **sizes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eos_token_id": 7}, "eos_token_id=7, but the end token of the prompt tokenizer is"),
        ({"vocab_size": 300}, "vocab_size=300, but the prompt tokenizer has token ids up to 5"),
        ({"max_position_embeddings": 11}, "=11, but the prompt tokenizer makes prompts of 12"),
        ({"hidden_size": 16}, "width 16 with 12 tokens does not fit text_width=32"),
    ],
)
def test_an_encoder_of_another_tokenizer_is_refused(
    tokenizer: PromptTokenizer, model: "CLIPTextModel", change: dict[str, int], message: str
) -> None:
    check_text_parts(model, tokenizer, text_width=32, max_tokens=12)
    check_text_parts(with_eos(model, 2), tokenizer, text_width=32, max_tokens=12)  # the largest id
    for name, value in ({"eos_token_id": tokenizer.eos_id} | change).items():
        setattr(model.config, name, value)
    with pytest.raises(ConfigError, match=message):
        check_text_parts(model, tokenizer, text_width=32, max_tokens=12)


def test_several_end_tokens_are_refused(model: "CLIPTextModel") -> None:
    model.config.eos_token_id = [1, 2]
    with pytest.raises(CheckpointError, match="one token id"):
        TextEncoderStage(model)
