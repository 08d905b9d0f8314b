"""A model small enough to export in seconds, and a memory of graphs so that each is traced once."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest
from safetensors.numpy import load_file, save_file

import nsp.export.build
from nsp.artifacts.checkpoint import read_checkpoint, write_digests
from nsp.artifacts.manifest import Manifest
from nsp.export.graph.onnx_export import MODEL_NAME, export_stage
from nsp.export.options import ExportOptions
from nsp.export.run import export as run_export
from nsp.files import write_folder
from tests.export.small import new_small_checkpoint


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text-conditional checkpoint of three scales and one block."""
    return new_small_checkpoint(tmp_path_factory.mktemp("small") / "checkpoint")


@pytest.fixture(scope="session")
def other_checkpoint(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model: only its decoder differs, so that only that is traced again."""
    folder = tmp_path_factory.mktemp("other") / "checkpoint"
    shutil.copytree(small_checkpoint, folder)
    path = next((folder / "vae").glob("*.safetensors"))
    tensors = load_file(path)
    tensors["decoder.conv_out.bias"] += 0.125
    save_file(tensors, path)
    write_digests(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def traced_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let a graph that was traced before, of the same weights and declaration, be copied."""
    base = tmp_path_factory.getbasetemp()
    # Workers of one run share the folder beside their own.
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "graphs"
    folder.mkdir(exist_ok=True)

    def remembered(
        stage: Any, io: Any, target: Path, *, metadata: Mapping[str, str], **settings: Any
    ) -> Path:
        digest = hashlib.sha256(json.dumps([io.to_dict(), settings], sort_keys=True).encode())
        for name, tensor in sorted(stage.state_dict().items()):
            digest.update(f"{name} {tensor.dtype}".encode())
            digest.update(tensor.float().numpy().tobytes())
        known = folder / digest.hexdigest()
        if not known.exists():
            with write_folder(known) as partial:
                export_stage(stage, io, partial, metadata={}, **settings)
        shutil.copytree(known, target, dirs_exist_ok=True)
        model = onnx.load(target / MODEL_NAME, load_external_data=False)
        onnx.helper.set_model_props(model, dict(sorted(metadata.items())))
        onnx.save(model, target / MODEL_NAME)
        return target / MODEL_NAME

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nsp.export.build, "export_stage", remembered)
        yield


@pytest.fixture
def options(small_checkpoint: Path, tmp_path: Path) -> ExportOptions:
    """Options of a plain fp32 export for ONNX Runtime."""
    return ExportOptions(
        checkpoint=str(small_checkpoint),
        engine_dir=str(tmp_path / "engines"),
        targets=("onnxruntime",),
    )


@pytest.fixture(scope="session")
def system(small_checkpoint: Path) -> Any:
    """The small model in PyTorch; not to be changed."""
    return read_checkpoint(small_checkpoint).load()


@pytest.fixture(scope="session")
def half_engines(
    small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Manifest]:
    """An engine folder in fp32 and fp16, and its manifest; not to be written to."""
    folder = tmp_path_factory.mktemp("half") / "engines"
    options = ExportOptions(
        checkpoint=str(small_checkpoint),
        engine_dir=str(folder),
        targets=("onnxruntime",),
        precisions=("fp32", "fp16"),
    )
    return folder, run_export(options)
