import dataclasses
import tarfile
from pathlib import Path
from typing import Any

import pytest

from nsp.artifacts.checkpoint import read_checkpoint
from nsp.artifacts.manifest import read_manifest, write_manifest
from nsp.benchmarks.contest.subject import BASELINE, CAPTIONS, Subject, load_subject
from nsp.data.sources import EMOJI_TAR
from nsp.errors import CheckpointError, EngineError
from tests.artifacts.engine_folders import CLASSES, TEXT, write_engines


def engines(folder: Path, config: Any = TEXT, **manifest: str) -> Path:
    """Write engines that load and compute nothing; `manifest` changes what theirs says."""
    write_engines(folder, config)
    write_manifest(folder, dataclasses.replace(read_manifest(folder), **manifest))
    return folder


def load(folder: Path, checkpoint: Path | None = None) -> Subject:
    return load_subject(folder, checkpoint=checkpoint, backend="auto", precision=None, threads=1)


def test_the_baseline_is_the_checkpoint_the_manifest_names(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    weights = read_checkpoint(tiny_checkpoint).weights_hash()
    folder = engines(tmp_path / "engines", source=str(tiny_checkpoint), model_hash=weights)
    subject = load(folder)
    assert [side.name for side in subject.sides] == ["onnxruntime", BASELINE]
    assert subject.baseline_missing is None
    assert subject.checkpoint == tiny_checkpoint
    assert subject.device == "cpu"
    assert subject.weights_mib[BASELINE] > 0.2
    assert 0 < subject.weights_mib["onnxruntime"] < 0.1  # hollow
    model = subject.model()
    assert (model.backend, model.precision, model.kv_layout) == ("onnxruntime", "fp32", "present")
    assert model.model_hash == weights


def test_without_its_checkpoint_the_reason_and_the_remedy_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    subject = load(engines(tmp_path / "engines", source="somewhere else"))
    assert subject.baseline is None
    assert subject.baseline_missing is not None
    assert "--checkpoint" in subject.baseline_missing


def test_another_model_is_no_baseline(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = engines(tmp_path / "engines", source=str(tiny_checkpoint), model_hash="f" * 64)
    assert "f" * 12 in (load(folder).baseline_missing or "")
    with pytest.raises(CheckpointError, match="made from ffffffffffff"):
        load(folder, tiny_checkpoint)


def test_a_checkpoint_that_is_asked_for_must_be_there(tmp_path: Path) -> None:
    folder = engines(tmp_path / "engines")
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load(folder, tmp_path / "missing")


def test_a_folder_without_engines_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="nsp export"):
        load(tmp_path)


def test_conditions_fit_the_kind_of_model(tmp_path: Path) -> None:
    classes = load(engines(tmp_path / "classes", CLASSES))
    assert classes.conditions(4) == {"class_ids": [0, 2, 5, 7]}  # of ten
    text = load(engines(tmp_path / "text"))
    prompts = text.conditions(11)["prompts"]
    assert len(prompts) == 11
    tokenizer = text.contender.pipeline.tokenizer
    assert tokenizer is not None
    assert all(tokenizer.truncated(prompt) is None for prompt in prompts)


def test_prompts_are_captions_of_the_data_set() -> None:
    with tarfile.open(EMOJI_TAR) as tar:
        texts = [tar.extractfile(name) for name in tar.getnames() if name.endswith(".txt")]
        known = {text.read().decode().strip() for text in texts if text is not None}
    assert set(CAPTIONS) <= known
