"""The golden model, converted from the public files as `nsp convert` does."""

import json
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor

from nsp.artifacts.checkpoint import read_checkpoint
from nsp.diffusion.noise import Betas
from nsp.families.inl_diffusion.published import convert
from nsp.families.inl_diffusion.system import InlSystem
from tests.goldens.inl_tiny.fixtures import GOLDEN_DIR

NUM_IDS = 96
NULL = "t2"  # the public tokenizer's ids of "" are this one, then padding
FILES = {"tokenizer": "weights_vae", "predictor": "weights_dit", "text-encoder": "weights_text"}


def prompt_of(ids: Tensor) -> str:
    """Return the prompt whose token ids are these, without the padding behind."""
    listed = ids.tolist()
    while listed and listed[-1] == 0:
        listed.pop()
    return " ".join(f"t{number}" for number in listed)


def write_text_encoder(folder: Path) -> Path:
    """Write the public text encoder's file with a tokenizer beside it; return the file.

    Token k is the word "tk", and 0 is padding.
    """
    vocabulary = {f"t{number}": number for number in range(NUM_IDS)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="t1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "t0"}))
    file = folder / "text_final.safetensors"
    file.write_bytes((GOLDEN_DIR / "weights_text.safetensors").read_bytes())
    return file


def state(name: str) -> dict[str, Tensor]:
    """Return the weights of a published file, to be changed."""
    return dict(load_file(GOLDEN_DIR / f"weights_{name}.safetensors"))


def arguments(**noise: Any) -> dict[str, Any]:
    """Return the public constructor arguments, for `--config`."""
    values = json.loads((GOLDEN_DIR / "config.json").read_text())
    return {"vae": values["vae"], "dit": values["dit"], "noise": noise}


def files(folder: Path) -> dict[str, Path]:
    """Return the public files by the options of `nsp convert`."""
    found = {name: GOLDEN_DIR / f"{stem}.safetensors" for name, stem in FILES.items()}
    return {**found, "text-encoder": write_text_encoder(folder / "text")}


@cache
def golden(betas: Betas = "scaled_linear") -> InlSystem:
    """Return the golden model for this noise."""
    cosine = {"smallest_beta": 1e-4, "largest_beta": 0.9999} if betas == "cosine" else {}
    given: Mapping[str, Any] = arguments(betas=betas, **cosine)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        convert(files(Path(folder)), given, out)
        loaded: InlSystem = read_checkpoint(out).load()
        return loaded
