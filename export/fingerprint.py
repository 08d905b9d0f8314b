"""Fingerprints: one SHA-256 over everything that decides the content of a built stage."""

import hashlib
import importlib.metadata
import inspect
import json
from pathlib import Path
from typing import Any

from nsp.family import contract
from nsp.walk import files_below

# Increase it whenever the exporter writes other files for the same input.
EXPORTER_VERSION = 3

_TOOLS = ("torch", "onnx", "onnxscript", "onnx-ir", "transformers")
_SHARED = ("layers", "text", "export/graph")  # folders of nsp whose code graphs come from


def fingerprint(**facts: Any) -> str:
    """Return the SHA-256 of JSON-ready facts, independent of their order."""
    text = json.dumps({"exporter": EXPORTER_VERSION, **facts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def tool_versions() -> dict[str, str]:
    """Return the versions of the packages that write ONNX; they are read, not imported."""
    versions = {}
    for package in _TOOLS:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def code_digest(family: type) -> str:
    """Return the SHA-256 of the Python files that a stage's graph comes from.

    They are the folder of the family's class, what families share, and what traces graphs.
    """
    declared = Path(inspect.getfile(family))
    in_package = (declared.parent / "__init__.py").is_file()
    product = Path(inspect.getfile(contract)).parents[1]
    digest = hashlib.sha256()
    for source in [declared.parent if in_package else declared, *map(product.joinpath, _SHARED)]:
        for path in files_below(source) if source.is_dir() else [source]:
            if path.suffix == ".py":
                inside = path.relative_to(source.parent).as_posix()
                content = hashlib.sha256(path.read_bytes()).hexdigest()
                digest.update(f"{inside} {content}\n".encode())
    return digest.hexdigest()
