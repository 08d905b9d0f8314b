"""The golden models, converted once for all tests of this folder."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nsp.artifacts.checkpoint import read_checkpoint
from nsp.families.next_patch.published import convert
from nsp.families.next_patch.system import NextPatchSystem
from tests.goldens.llamagen_tiny.fixtures import arguments, weights


@cache
def golden(gpt: str = "gpt", l2_norm: bool = True) -> NextPatchSystem:
    """Return a golden model, read from the checkpoint folder that `convert` wrote."""
    config: dict[str, Any] = arguments(gpt, codebook_l2_norm=l2_norm)
    with TemporaryDirectory() as folder:
        out = Path(folder) / "checkpoint"
        convert(tokenizer=weights("vq"), predictor=weights(gpt), config=config, output_dir=out)
        loaded: NextPatchSystem = read_checkpoint(out).load()
        return loaded
