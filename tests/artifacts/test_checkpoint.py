"""Checkpoint folders: read back exactly, refused when damaged, stored in half on request."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from nsp.artifacts.checkpoint import copy_in_half, read_checkpoint, write_digests
from nsp.artifacts.systems import save_checkpoint
from nsp.errors import CheckpointError, ConfigError
from tests.disk import largest_file


@pytest.fixture
def copy(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


def test_saving_and_loading_is_exact(tiny_checkpoint: Path, tmp_path: Path) -> None:
    system = read_checkpoint(tiny_checkpoint).load()
    save_checkpoint(tmp_path / "again", system, notes={}, sampling={"top_k": 3})
    record = read_checkpoint(tmp_path / "again")
    assert record.sampling == {"top_k": 3}
    again = record.load().state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in system.state_dict().items())


def test_half_precision_copy_loads_rounded_and_is_half_as_large(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    copy_in_half(tiny_checkpoint, tmp_path / "half")
    whole = read_checkpoint(tiny_checkpoint).load().state_dict()
    half = read_checkpoint(tmp_path / "half").load().state_dict()
    for name, tensor in whole.items():
        expected = tensor.half().float() if tensor.is_floating_point() else tensor
        assert torch.equal(half[name], expected), name
    weights = "predictor/model.safetensors"
    sizes = [(folder / weights).stat().st_size for folder in (tiny_checkpoint, tmp_path / "half")]
    assert sizes[1] < 0.6 * sizes[0]


def test_a_full_disk_names_the_weights_and_leaves_nothing(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    system = read_checkpoint(tiny_checkpoint).load()
    name = "predictor/model.safetensors"
    with largest_file(20_000), pytest.raises(OSError, match="File too large") as caught:
        save_checkpoint(tmp_path / "again", system, notes={})
    assert caught.value.filename == str(tmp_path / "again" / name)
    with largest_file(20_000), pytest.raises(OSError, match="File too large") as caught:
        copy_in_half(tiny_checkpoint, tmp_path / "half")
    assert caught.value.filename == str(tmp_path / "half" / name)
    assert list(tmp_path.iterdir()) == []


def test_halving_damaged_weights_names_them(copy: Path, tmp_path: Path) -> None:
    (copy / "vae/model.safetensors").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match=r"vae/model\.safetensors is text"):
        copy_in_half(copy, tmp_path / "half")
    assert not (tmp_path / "half").exists()


def test_weights_hash_follows_the_weights_not_the_notes(copy: Path) -> None:
    before = read_checkpoint(copy).weights_hash()
    values = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**values, "notes": {"other": 1}}))
    (copy / "README.md").write_text("# A card")
    write_digests(copy)
    assert read_checkpoint(copy).weights_hash() == before
    path = copy / "vae/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    write_digests(copy)
    assert read_checkpoint(copy).weights_hash() != before


def test_damage_is_named(copy: Path) -> None:
    path = copy / "predictor/model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is .* cut short: it has 1,000"):
        read_checkpoint(copy).load()
    path.unlink()
    with pytest.raises(CheckpointError, match=r"predictor/model\.safetensors is missing"):
        read_checkpoint(copy).load()


def test_config_json_is_checked(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"does not exist; .*config\.json"):
        read_checkpoint(tmp_path / "nowhere")
    (copy / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is damaged"):
        read_checkpoint(copy)
    (copy / "config.json").write_text('{"family": "unknown", "config": {}}')
    with pytest.raises(ConfigError, match="unknown family 'unknown'; known: var"):
        read_checkpoint(copy)


def test_an_unknown_configuration_key_is_named(copy: Path) -> None:
    values = json.loads((copy / "config.json").read_text())
    values["config"]["predictor"]["widht"] = 3
    (copy / "config.json").write_text(json.dumps(values))
    write_digests(copy)
    with pytest.raises(CheckpointError, match=r"config\.json .*unknown key 'widht'"):
        read_checkpoint(copy)


def test_settings_that_are_not_allowed_are_named_with_their_folder(copy: Path) -> None:
    values = json.loads((copy / "config.json").read_text())
    changed = {**values, "sampling": {"top_k": "many"}}
    (copy / "config.json").write_text(json.dumps(changed))
    write_digests(copy)
    with pytest.raises(CheckpointError, match=r"config\.json .*VarSampling\.top_k"):
        read_checkpoint(copy)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"family": []}, "ConfigFile.family"),
        ({"config": 3}, "ConfigFile.config"),
        ({"sampling": []}, "ConfigFile.sampling"),
        ({"notes": 1}, "ConfigFile.notes"),
        ({"smapling": {}}, "unknown key 'smapling'"),
    ],
)
def test_a_damaged_record_is_named_with_its_folder(
    copy: Path, change: dict[str, object], words: str
) -> None:
    values = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**values, **change}))
    with pytest.raises(CheckpointError, match=words) as caught:
        read_checkpoint(copy)
    assert str(copy / "config.json") in str(caught.value)


def test_a_text_encoder_that_is_not_finite_is_named(copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = copy / "text_encoder/model.safetensors"
    tensors = load_file(path)
    name = next(key for key in tensors if key.endswith("fc1.bias"))
    tensors[name][0] = torch.nan
    save_file(tensors, path, metadata={"format": "pt"})
    write_digests(copy)
    with pytest.raises(CheckpointError, match=r"fc1\.bias contains NaN"):
        read_checkpoint(copy).load()
