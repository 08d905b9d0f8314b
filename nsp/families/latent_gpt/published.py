"""Reads the weights of a published VQGAN into our image tokenizer.

Source of the names: github.com/CompVis/taming-transformers, taming/models/vqgan.py and
taming/modules/diffusionmodules/model.py. They differ from ours by the attention's three separate
projections alone; up levels are counted alike, the finest first.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from nsp.artifacts.checkpoint import read_checkpoint
from nsp.errors import CheckpointError, ConfigError
from nsp.families.latent_gpt.system import LatentGptSystem
from nsp.raster.vq import VqTokenizer
from nsp.raster.vq_config import VqConfig
from nsp.weights.module_weights import bounded, joined, load_state
from nsp.weights.state_names import find_state, what_it_is
from nsp.weights.weight_files import read_tensor_file

_UNUSED = "loss."  # the discriminator and the perceptual network, which only training needs
_PROJECTIONS = ("q", "k", "v")
_ATTENTION = re.compile(r"(.*\battn(?:_1|\.\d+)\.)(?:q|k|v)\.(weight|bias)")


def read_vq(path: Path) -> VqTokenizer:
    """Return the image tokenizer in a file of weights, or that of a checkpoint of this family.

    A file may have any wrapping; sizes follow from the tensors' shapes. Raises CheckpointError
    naming a file of something else, or a missing, extra or misshapen tensor.
    """
    if path.is_dir():
        record = read_checkpoint(path)
        if not isinstance(system := record.load(), LatentGptSystem):
            raise CheckpointError(
                f"{path} is a checkpoint of family {record.family.name}; give one of latent_gpt"
            )
        return system.vq
    state = our_names(find_state(read_tensor_file(path), path), str(path))
    config = _sizes(state, path)
    with bounded([tensor.shape for tensor in state.values()], str(path)):
        vq = VqTokenizer(config)
    measured = {n: t for n, t in vq.state_dict().items() if n.startswith("quantize.usage")}
    load_state(vq, {**measured, **state}, str(path))
    return vq.eval()


def our_names(state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Return the tensors by our names: queries, keys and values of an attention in one.

    Raises CheckpointError naming the file and a tensor if these three do not fit together.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith(_UNUSED):
            continue
        match = _ATTENTION.fullmatch(name)
        if match is None:
            found[name.replace("quantize.embed.", "quantize.embedding.")] = tensor
            continue
        block, kind = match.groups()
        names = [f"{block}{each}.{kind}" for each in _PROJECTIONS]
        found[f"{block}qkv.{kind}"] = joined(state, names, source)
    return found


def _sizes(state: Mapping[str, Tensor], path: Path) -> VqConfig:
    """Return the configuration that follows from the shapes."""

    def shape(name: str, num_axes: int) -> torch.Size:
        found = state[name].shape if name in state else torch.Size()
        if len(found) != num_axes or 0 in found:
            raise CheckpointError(
                f"{path} {what_it_is(path, state)}; give the weights of a VQGAN (tensor {name} is "
                "missing or misshapen)"
            )
        return found

    codes, width = shape("quantize.embedding.weight", 2)
    base, colours = shape("encoder.conv_in.weight", 4)[:2]
    shape("encoder.down.0.block.0.conv1.weight", 4)
    levels = {int(m[1]) for n in state if (m := re.match(r"encoder\.down\.(\d{1,2})\.", n))}
    widths = [shape(f"encoder.down.{i}.block.0.conv1.weight", 4)[0] for i in range(len(levels))]
    blocks = {m[1] for n in state if (m := re.match(r"encoder\.down\.0\.block\.(\d{1,2})\.", n))}
    try:
        return VqConfig(
            codebook_size=codes,
            codebook_width=width,
            is_normalised=False,
            latent_channels=shape("encoder.conv_out.weight", 4)[0],
            base_channels=base,
            channel_multipliers=tuple(each // base for each in widths),
            num_res_blocks=len(blocks),
            patch_size=round((colours / 3) ** 0.5),
        )
    except ConfigError as error:
        raise CheckpointError(f"{path} has impossible sizes: {error}") from error
