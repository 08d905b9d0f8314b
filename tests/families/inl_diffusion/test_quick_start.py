"""The public package's names work as its documentation shows them."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import nsp
from nsp.errors import CheckpointError, ConfigError
from nsp.families.inl_diffusion import INLVAE, INLDiffusionPipeline, INLDiT
from nsp.family.registry import family
from nsp.pipeline.pipeline import torch_pipeline
from tests.families.inl_diffusion.golden import arguments, files, golden
from tests.goldens.inl_tiny.fixtures import GOLDEN_DIR

VAE, DIT = GOLDEN_DIR / "weights_vae.safetensors", GOLDEN_DIR / "weights_dit.safetensors"
PROMPT = "t7 t8 t9"


@pytest.fixture
def pipeline(tmp_path: Path) -> INLDiffusionPipeline:
    vae, dit = INLVAE.load(VAE), INLDiT.load(str(DIT))
    text = files(tmp_path)["text-encoder"]
    return INLDiffusionPipeline(vae, dit, text, config=arguments(), device="cpu")


def test_a_prompt_becomes_a_file(pipeline: INLDiffusionPipeline, tmp_path: Path) -> None:
    made = pipeline(prompt=PROMPT, num_inference_steps=3, guidance_scale=7.5)
    made.save(tmp_path / "output.png")
    with Image.open(tmp_path / "output.png") as picture:
        assert picture.size == (64, 64)


def test_its_settings_and_pictures_are_those_of_the_converted_model(
    pipeline: INLDiffusionPipeline,
) -> None:
    assert (pipeline.sampling.num_inference_steps, pipeline.sampling.guidance_scale) == (50, 7.5)
    assert pipeline.config == golden().config
    other = torch_pipeline(family("inl_diffusion"), golden(), device="cpu")
    found, wanted = (
        each(PROMPT, seed=3, num_inference_steps=2, output_type="np").images
        for each in (pipeline, other)
    )
    assert np.array_equal(np.asarray(found), np.asarray(wanted))
    assert isinstance(pipeline, nsp.Pipeline)


def test_importing_the_family_imports_no_torch() -> None:
    code = (
        "import sys; import nsp.families.inl_diffusion as f; f.InlDiffusion; "
        "assert 'torch' not in sys.modules; f.INLVAE; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_wrong_parts_are_one_clear_line(tmp_path: Path) -> None:
    vae, dit = INLVAE.load(VAE), INLDiT.load(DIT)
    with pytest.raises(CheckpointError, match="holds the transformer of INL-Diffusion"):
        INLVAE.load(DIT)
    with pytest.raises(CheckpointError, match="does not exist"):
        INLDiT.load(tmp_path / "dit_final.pt")
    swapped: tuple[Any, Any] = (dit, vae)
    with pytest.raises(ConfigError, match=r"vae is a INLDiT; give INLVAE.load\(FILE\)"):
        INLDiffusionPipeline(*swapped)
    with pytest.raises(ConfigError, match="have no text encoder in them"):
        INLDiffusionPipeline(vae, dit)
