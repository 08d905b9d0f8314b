"""Small real models shared by the whole suite."""

from pathlib import Path

import pytest

from tests.goldens.var_tiny.fixtures import GOLDEN_DIR
from tests.models import new_tiny_checkpoint

# Minutes in one file each: begun last, one of them would run alone on one of two workers.
SLOW_FILES = ("tests/test_readme.py", "tests/testing/test_families.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the slow files first."""
    items.sort(key=lambda item: not item.nodeid.startswith(SLOW_FILES))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text-conditional checkpoint folder: tiny, 16 px, random weights that matter everywhere."""
    return new_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="session")
def tiny_class_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A class-conditional checkpoint folder: the public implementation's model, converted."""
    import json

    from nsp.families.var.published import convert

    folder = tmp_path_factory.mktemp("class") / "checkpoint"
    config = json.loads((GOLDEN_DIR / "config.json").read_text())
    convert(
        tokenizer=GOLDEN_DIR / "weights_vae.safetensors",
        predictor=GOLDEN_DIR / "weights_var.safetensors",
        config={part: config[part] for part in ("vae", "var")},
        output_dir=folder,
    )
    return folder
