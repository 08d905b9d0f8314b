"""Writes engine folders whose models load and compute nothing, for tests of opening them."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nsp.artifacts.manifest import (
    PRECISION_DTYPES,
    SCHEMA,
    TOKENIZER_DIR,
    Manifest,
    Precision,
    Variant,
    content_name,
    write_manifest,
)
from nsp.families.var.config import SIZES, VarConfig, with_condition
from nsp.family.classes import ClassCondition
from nsp.files import file_sha256
from nsp.stage.io import StageIO
from nsp.text.tokenizer import PromptTokenizer, train_tokenizer
from tests.backends.onnx_stages import write_hollow_model
from tests.models import CAPTIONS, stages_io

TEXT = SIZES["tiny"]
CLASSES = with_condition(TEXT, ClassCondition(num_classes=10))


def write_engines(
    folder: Path,
    config: VarConfig = CLASSES,
    *,
    precisions: Sequence[Precision] = ("fp32",),
    kv_layout: str = "present",
    backend: str = "onnxruntime",
    tokenizer: PromptTokenizer | None = None,
    **changes: Any,
) -> Manifest:
    """Write an engine folder and return its manifest; `changes` go to every variant."""
    variants: dict[str, tuple[Variant, ...]] = {}
    for precision in precisions:
        declared = stages_io(config, kv_layout, PRECISION_DTYPES[precision])
        for stage, io in declared.items():
            variant = _write_variant(folder, stage, io, backend, precision, kv_layout)
            variant = dataclasses.replace(variant, **changes)
            variants[stage] = (*variants.get(stage, ()), variant)
    files = {}
    if config.text is not None:
        made = train_tokenizer(CAPTIONS, vocab_size=560, max_tokens=config.text.max_tokens)
        (tokenizer or made).save(folder / "made")
        files = named_by_content(folder, "made", f"{TOKENIZER_DIR}/")
    manifest = Manifest(
        schema=SCHEMA,
        family="var",
        config=config.to_dict(),
        model_hash="0" * 64,
        source="tests",
        files=files,
        stages=variants,
    )
    write_manifest(folder, manifest)
    return manifest


def _write_variant(
    folder: Path,
    stage: str,
    io: StageIO,
    backend: str,
    precision: Precision,
    kv_layout: str,
) -> Variant:
    write_hollow_model(folder / "made/model.onnx", io)
    files = named_by_content(folder, "made", f"{stage}/{backend}-{precision}-")
    return Variant(
        backend=backend,
        precision=precision,
        kv_layout=kv_layout,
        opset=18,
        io=io.to_dict(),
        files=files,
        fingerprint="0" * 64,
    )


def named_by_content(folder: Path, made: str, prefix: str) -> dict[str, str]:
    """Give the folder `made` its name as an export does; return {path: SHA-256} of its files."""
    digests = {path.name: file_sha256(path) for path in sorted((folder / made).iterdir())}
    name = prefix + content_name(digests)
    shutil.rmtree(folder / name, ignore_errors=True)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / made).rename(folder / name)
    return {f"{name}/{file}": digest for file, digest in digests.items()}


def engine_file(
    folder: Path, stage: str, variant: str = "onnxruntime-fp32", *, name: str = "model.onnx"
) -> Path:
    """Return the file of a stage that lies in `folder` under the name of its content."""
    (path,) = folder.glob(f"{stage}/{variant}-*/{name}")
    return path


def change_manifest(folder: Path, **changes: Any) -> None:
    """Write the manifest again with other values."""
    from nsp.artifacts.manifest import read_manifest

    write_manifest(folder, dataclasses.replace(read_manifest(folder), **changes))
