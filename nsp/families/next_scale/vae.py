"""The autoencoder: `diffusers.AutoencoderKL`, new or from a folder, and its decoder in half types.

The stock SDXL decoder's activations leave float16 (its config says `force_upcast`). What lies
between two norms of the decoder is linear in the convolutions there, and a norm takes the size out
again; so dividing those convolutions by a power of two, and the norms' epsilon by its square,
leaves the picture as it is, bit for bit in float32, and makes all activations smaller. The scale is
measured when a folder is read, and part of the configuration.

Axes: B images, C latent channels, h w latent grid, H W pixels.
"""

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsp.errors import CheckpointError
from nsp.families.next_scale.config import VaeConfig
from nsp.weights.module_weights import bounded, load_state
from nsp.weights.state_names import plain_names
from nsp.weights.weight_files import find_weights, read_safetensors, read_settings

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

_LARGEST = 65504 / 8  # of float16, with room for pictures beyond those measured
_STEMS = ("diffusion_pytorch_model", "model")
_READ = ("block_out_channels", "layers_per_block", "latent_channels", "norm_num_groups")
# Values that AutoencoderKL's own code supports and this decoder does not.
_FIXED = {"act_fn": "silu", "in_channels": 3, "out_channels": 3}
# Names of folders saved before diffusers 0.18, in the one attention block.
_OLD_NAMES = {
    ".query.": ".to_q.",
    ".key.": ".to_k.",
    ".value.": ".to_v.",
    ".proj_attn.": ".to_out.0.",
}


class Vae(nn.Module):
    """Autoencoder and the factor by which its latents have unit variance."""

    MEASURED_BUFFERS = ("scaling_factor",)  # in training; the configuration has the first one

    scaling_factor: Tensor

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        self.autoencoder = new_autoencoder(config)
        self.register_buffer("scaling_factor", torch.tensor(config.scaling_factor))

    def encode(self, image_B3HW: Tensor) -> Tensor:
        """Return the latent (B, C, h, w) of pictures in [-1, 1]: the mean of its distribution."""
        mean: Tensor = self.autoencoder.encode(image_B3HW).latent_dist.mode()
        return mean * self.scaling_factor

    def decode(self, latent_BChw: Tensor) -> Tensor:
        """Return the picture (B, 3, H, W), about [-1, 1], in float32."""
        return decode(self.autoencoder, latent_BChw.float() / self.scaling_factor)


def new_autoencoder(config: VaeConfig) -> "AutoencoderKL":
    """Return an AutoencoderKL with random weights."""
    from diffusers import AutoencoderKL

    levels = len(config.block_out_channels)
    model: AutoencoderKL = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_num_groups,
        scaling_factor=config.scaling_factor,
    )
    _set_epsilon(model, config.decoder_scale)
    return model


def decode(autoencoder: Any, z_BChw: Tensor) -> Tensor:
    """Return pictures in float32, convolutions and attention in the dtype of their weights.

    `AutoencoderKL.decode` but for dtypes: norms are float32 around half convolutions, where the
    library would want one dtype for all.
    """
    decoder = autoencoder.decoder
    dtype = decoder.conv_in.weight.dtype
    x = decoder.conv_in(autoencoder.post_quant_conv(z_BChw.to(dtype)))
    first, *others = decoder.mid_block.resnets
    x = _resnet(first, x)
    for attention, resnet in zip(decoder.mid_block.attentions, others, strict=True):
        x = _resnet(resnet, _attention(attention, x))
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = _resnet(resnet, x)
        for upsampler in block.upsamplers or ():
            x = upsampler.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    image: Tensor = decoder.conv_out(F.silu(_norm(decoder.conv_norm_out, x)).to(dtype))
    return image.float()


def _norm(norm: nn.GroupNorm, x_BChw: Tensor) -> Tensor:
    """Return the group norm in float32."""
    return F.group_norm(x_BChw.float(), norm.num_groups, norm.weight, norm.bias, norm.eps)


def _resnet(block: Any, x_BChw: Tensor) -> Tensor:
    dtype = block.conv1.weight.dtype
    hidden = block.conv1(F.silu(_norm(block.norm1, x_BChw)).to(dtype))
    hidden = block.conv2(F.silu(_norm(block.norm2, hidden)).to(dtype))
    skipped = x_BChw if block.conv_shortcut is None else block.conv_shortcut(x_BChw)
    summed: Tensor = skipped + hidden
    return summed


def _attention(attention: Any, x_BChw: Tensor) -> Tensor:
    """Return x plus attention of all cells to all, with one head."""
    normed = _norm(attention.group_norm, x_BChw).flatten(2).transpose(1, 2)
    tokens = normed.to(attention.to_q.weight.dtype)
    q, k, v = (layer(tokens)[:, None] for layer in (attention.to_q, attention.to_k, attention.to_v))
    mixed: Tensor = attention.to_out[0](F.scaled_dot_product_attention(q, k, v)[:, 0])
    return x_BChw + torch.unflatten(mixed.transpose(1, 2), 2, x_BChw.shape[2:])


@torch.no_grad()
def rescale_decoder(autoencoder: Any, scale: int) -> None:
    """Divide all activations of the decoder by `scale`, a power of two; pictures stay the same."""
    from diffusers.models.attention_processor import Attention
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.upsampling import Upsample2D

    decoder = autoencoder.decoder
    from_norm, from_activations = [decoder.conv_in], []
    for module in decoder.modules():
        match module:
            case ResnetBlock2D():
                from_norm += [module.conv1, module.conv2]
                if module.conv_shortcut is not None:
                    from_activations.append(module.conv_shortcut)
            case Attention():
                from_norm.append(module.to_out[0])
            case Upsample2D():
                from_activations.append(module.conv)
    for layer in from_norm:  # what comes in has its size from a norm, or from the latent
        layer.weight.div_(scale)
    for layer in (*from_norm, *from_activations):
        layer.bias.div_(scale)
    _set_epsilon(autoencoder, scale)


def _set_epsilon(autoencoder: Any, scale: int) -> None:
    """Divide the epsilon of the decoder's norms by the square of `scale`: variances are."""
    for module in autoencoder.decoder.modules():
        if isinstance(module, nn.GroupNorm):
            module.eps /= scale**2


@torch.no_grad()
def largest_activation(autoencoder: Any, z_BChw: Tensor) -> float:
    """Return the largest absolute value any part of the decoder gives for these latents."""
    largest = 0.0

    def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
        nonlocal largest
        if isinstance(output, Tensor):
            largest = max(largest, float(output.detach().abs().max()))

    handles = [module.register_forward_hook(note) for module in autoencoder.decoder.modules()]
    try:
        autoencoder.decode(z_BChw)
    finally:
        for handle in handles:
            handle.remove()
    return largest


def scale_for_half(largest: float) -> int:
    """Return the power of two by which activations up to `largest` fit float16 with room left."""
    return int(2 ** max(0, math.ceil(math.log2(max(largest, 1.0) / _LARGEST))))


def load_vae(folder: Path, pictures_B3HW: Tensor | None = None) -> tuple[Vae, VaeConfig]:
    """Return the autoencoder in a diffusers folder (or its part `vae`), ready for half precision.

    Its decoder is measured on standard-normal latents and on those of `pictures_B3HW` ([-1, 1]).
    Raises CheckpointError for a folder of another kind, or an incomplete one.
    """
    root = _root(folder)
    config = read_vae_config(folder)
    state: dict[str, Tensor] = {}
    for path in find_weights(root, _STEMS, what="autoencoder"):
        state |= read_safetensors(path)
    state = {_new_name(name): tensor for name, tensor in plain_names(state, root).items()}
    with bounded((tensor.shape for tensor in state.values()), str(root)):
        vae = Vae(config).eval()
    load_state(vae.autoencoder, state, str(root))
    generator = torch.Generator().manual_seed(0)
    latents = [torch.randn(2, config.latent_channels, 16, 16, generator=generator)]
    if pictures_B3HW is not None:
        with torch.no_grad():
            latents.append(vae.encode(pictures_B3HW))
    largest = max(largest_activation(vae.autoencoder, z / vae.scaling_factor) for z in latents)
    scale = scale_for_half(largest)
    rescale_decoder(vae.autoencoder, scale)
    vae.config = dataclasses.replace(config, decoder_scale=scale)
    return vae, vae.config


def _root(folder: Path) -> Path:
    """Return the folder of an autoencoder: the given one, or a pipeline's part `vae`."""
    return folder / "vae" if (folder / "vae" / "config.json").is_file() else folder


def _new_name(name: str) -> str:
    for old, new in _OLD_NAMES.items():
        name = name.replace(old, new)
    return name


def read_vae_config(folder: Path) -> VaeConfig:
    """Return the configuration of a diffusers folder; CheckpointError for another kind of model."""
    root = _root(folder)
    path = root / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{root} has no config.json; give an AutoencoderKL folder")
    values = read_settings(path)
    if values.get("_class_name") != "AutoencoderKL":
        raise CheckpointError(
            f"{root} contains a {values.get('_class_name')}; an AutoencoderKL is needed"
        )
    odd = [n for n in ("shift_factor", "latents_mean", "latents_std") if values.get(n) is not None]
    odd += [n for n in ("use_quant_conv", "use_post_quant_conv") if values.get(n) is False]
    odd += [n for n, value in _FIXED.items() if values.get(n, value) != value]
    for name, kind in (("down_block_types", "DownEncoder"), ("up_block_types", "UpDecoder")):
        given = values.get(name, [])
        usual = isinstance(given, list) and all(each == f"{kind}Block2D" for each in given)
        odd += [] if usual else [name]
    if odd or values.get("mid_block_add_attention") is False:
        name = odd[0] if odd else "mid_block_add_attention"
        raise CheckpointError(
            f"{path}: {name}={values[name]} is not supported; give an autoencoder of the "
            "Stable Diffusion 1, 2 or XL kind"
        )
    known = {name: values[name] for name in _READ if name in values}
    return VaeConfig.from_dict({**known, "scaling_factor": values.get("scaling_factor", 0.18215)})
