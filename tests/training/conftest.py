"""Captioned pictures and a run of seconds on them."""

import dataclasses
from pathlib import Path

import pytest

from nsp.family.recipe import RunConfig
from nsp.family.recipes import preset
from tests.training.pictures import write_pictures


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve 16 px pictures with captions beside them."""
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def config(pictures: Path) -> RunConfig:
    run = preset("smoke")
    data = dataclasses.replace(run.data, source=str(pictures))
    return dataclasses.replace(run, data=data)
