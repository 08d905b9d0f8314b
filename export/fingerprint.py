"""Fingerprints: one SHA-256 over everything that decides the content of a built stage."""

import hashlib
import importlib.metadata
import json
from typing import Any

# Increase it whenever the exporter writes other files for the same input.
EXPORTER_VERSION = 3

_TOOLS = ("torch", "onnx", "onnxscript", "onnx-ir", "transformers")


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
